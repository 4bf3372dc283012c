"""XML in libvirt's own style, from nodes; and XML that is not trusted, to elements."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lxml import etree

from qmpvcpu.errors import DomainXmlError

# XML 1.0 cannot hold these, save for tab and line breaks, which libvirt refuses in a name.
_UNWRITABLE = re.compile("[^\x20-\x7e\x80-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# What libvirt takes from a client (REMOTE_STRING_MAX), and ten times the document of 4096 vCPUs with a pin for each.
_MOST_BYTES = 4 * 1024 * 1024
# A row, a pin, a scheduler and a step for each of 16384 vCPUs take half of it.
_MOST_TAGS = 2**17
# It is a part of the name of each element and attribute, so that a long one costs its length as many times.
_LONG_NAMESPACE = re.compile(rb"""\sxmlns(?::[^\s=]{0,999})?\s*+=\s*+(?:"[^"]{257}|'[^']{257})""")
# What nearly every text is: there are some for each vCPU.
_PLAIN = re.compile("[\\w./:,-]*", re.ASCII)
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"})


@dataclass(frozen=True, slots=True)
class Node:
    """An element to be written.

    Attributes:
        tag: Its name, with its prefix.
        attributes: By name, in the order in which they are written.
        content: Text, or other elements; one that is given as text is a line that is ready to be written.
    """

    tag: str
    attributes: Mapping[str, object] = field(default_factory=dict)
    content: "str | tuple[Node | str, ...]" = ()


def write(node: Node) -> bytes:
    """Return *node* as libvirt would write it, without XML declaration, in UTF-8.

    Raises:
        DomainXmlError: A text holds a character that XML cannot.
    """
    lines: list[str] = []
    _write(node, "", lines.append)
    lines.append("")
    return "\n".join(lines).encode()


def _write(node: Node, indent: str, put: Callable[[str], None]) -> None:
    # libvirt writes what it knows in single quotes, and hands foreign metadata to libxml2, which writes double ones.
    quote = '"' if ":" in node.tag else "'"
    attributes = "".join([f" {key}={quote}{_escaped(value)}{quote}" for key, value in node.attributes.items()])
    if not node.content:
        put(f"{indent}<{node.tag}{attributes}/>")
    elif isinstance(node.content, str):
        put(f"{indent}<{node.tag}{attributes}>{_escaped(node.content)}</{node.tag}>")
    else:
        put(f"{indent}<{node.tag}{attributes}>")
        inner = indent + "  "
        for child in node.content:
            if isinstance(child, str):
                put(inner + child)
            else:
                _write(child, inner, put)
        put(f"{indent}</{node.tag}>")


def _escaped(value: object) -> str:
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    if _UNWRITABLE.search(text):
        raise DomainXmlError(f"{text!r} holds a character that a libvirt document cannot")
    return text.translate(_ESCAPES)


def parse_safely(xml: bytes) -> etree._Element:
    """Parse a document that anybody may have written.

    Nothing is fetched, no entity is expanded, nothing is included, no document type is accepted, and what is built is
    bounded: *xml* has at most 4 MiB, and 131,072 tags (comments and the like count too).

    Raises:
        DomainXmlError: Not well-formed (torn, empty, not UTF-8), too large, or with a document type; ``line`` says
            where.
    """
    if len(xml) > _MOST_BYTES:
        raise DomainXmlError(f"larger than {_MOST_BYTES} bytes, which is more than libvirt takes")
    if not xml.strip():
        raise DomainXmlError("the document is empty")
    try:
        xml.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DomainXmlError(f"not UTF-8 ({error.reason})", line=xml.count(b"\n", 0, error.start) + 1) from error
    # Refused before any parsing: entities, and with them every expansion attack, need a document type. Whatever
    # encoding the document claims, it is read as UTF-8, so that these bytes are the only way to spell one.
    doctype = xml.find(b"<!DOCTYPE")
    if doctype >= 0:
        raise DomainXmlError("a document type is not accepted", line=xml.count(b"\n", 0, doctype) + 1)
    if xml.count(b"<") > _MOST_TAGS:
        raise DomainXmlError(f"more than {_MOST_TAGS} tags, which no domain has")
    if found := _LONG_NAMESPACE.search(xml):
        line = xml.count(b"\n", 0, found.start()) + 1
        raise DomainXmlError("a namespace of more than 256 characters, which no domain has", line=line)
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_pis=True
    )
    try:
        return etree.fromstring(xml, parser)
    except etree.XMLSyntaxError as error:
        raise DomainXmlError(f"not well-formed: {error.msg}", line=error.lineno) from error


def line_of(element: etree._Element) -> int | None:
    """Return the line that *element* begins on, from 1, where known."""
    line = element.sourceline
    return line if isinstance(line, int) else None
