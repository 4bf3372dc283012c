"""XML from untrusted sources: parsed safely, and where its elements are in the bytes."""

import re
from typing import NamedTuple

from lxml import etree

from qmpvcpu.errors import DomainXmlError

# The most that libvirt accepts from a client (REMOTE_STRING_MAX); a document of 4096 pinned vCPUs has a tenth of it.
_MOST_BYTES = 4 * 1024 * 1024
# Twice as many as a row, a pin, a scheduler and a step for each of 16384 vCPUs.
_MOST_TAGS = 2**17
# A namespace is part of the name of each element and attribute, which multiplies its length.
_LONG_NAMESPACE = re.compile(rb"""\sxmlns(?::[^\s=]{0,999})?\s*+=\s*+(?:"[^"]{257}|'[^']{257})""")


def parse_safely(xml: bytes) -> etree._Element:
    """Parse a document from an untrusted source.

    Nothing is fetched or included, no entity is expanded, no document type is accepted, and memory is bounded: *xml*
    has at most 4 MiB and 131,072 tags (comments and the like count too).

    Raises:
        TypeError: Not bytes.
        DomainXmlError: Not well-formed (torn, empty, not UTF-8), too large, or with a document type; ``line`` says
            where.
    """
    if not isinstance(xml, bytes):
        hint = "text.encode()" if isinstance(xml, str) else "Path(...).read_bytes()"
        raise TypeError(f"a document is given as bytes, not {type(xml).__name__}: {hint} returns them")
    if len(xml) > _MOST_BYTES:
        raise DomainXmlError(f"larger than {_MOST_BYTES} bytes, which is more than libvirt takes")
    if not xml.strip():
        raise DomainXmlError("the document is empty")
    try:
        xml.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DomainXmlError(f"not UTF-8 ({error.reason})", line=xml.count(b"\n", 0, error.start) + 1) from error
    # Refused before any parsing: entities, and so every expansion attack, need a document type. The document is read
    # as UTF-8 whatever encoding it claims, so these bytes are the only way to spell one.
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
    """Return the line on which *element* begins, from 1, or None if not known."""
    line = element.sourceline
    return line if isinstance(line, int) else None


def text_of(element: etree._Element) -> str:
    """Return all text in *element*, as XPath's ``string()`` does."""
    return str(element.xpath("string()"))


# All markup of a well-formed document without document type. What looks like markup inside a comment, CDATA or an
# attribute's value is skipped as part of that. Nothing is tried twice, so this takes linear time on any bytes.
_MARKUP = re.compile(
    rb"""
    <!--.*?--> | <!\[CDATA\[.*?\]\]> | <\?.*?\?>
    | (?P<end></[^>]*+>)
    | (?P<start><(?:[^>"']++|"[^"]*+"|'[^']*+')*+>)
    """,
    re.DOTALL | re.VERBOSE,
)


class Span(NamedTuple):
    """Where one element is, in bytes from the beginning of the document; ends are exclusive.

    Attributes:
        start: Where its start tag begins.
        content: Where that tag ends and the content begins.
        close: Where its end tag begins; equal to ``content`` if there is none (``<a/>``).
        end: Where it ends.
    """

    start: int
    content: int
    close: int
    end: int

    @property
    def is_empty_tag(self) -> bool:
        """True if it is written as ``<a/>``."""
        return self.close == self.end


def find_spans(xml: bytes) -> list[Span]:
    """Return where each element is, in document order.

    Args:
        xml: A document that ``parse_safely`` has accepted: well-formed UTF-8, no document type. For any other, the
            result is meaningless.

    Example:
        >>> find_spans(b"<a><b c='>'/></a>")
        [Span(start=0, content=3, close=13, end=17), Span(start=3, content=13, close=13, end=13)]
    """
    found: list[Span | None] = []
    open_: list[tuple[int, int, int]] = []  # index in found, start and content
    for markup in _MARKUP.finditer(xml):
        kind = markup.lastgroup
        start, end = markup.span()
        if kind == "start":
            if xml[end - 2] == ord("/"):
                found.append(Span(start, end, end, end))
            else:
                open_.append((len(found), start, end))
                found.append(None)
        elif kind == "end":
            place, begun, content = open_.pop()
            found[place] = Span(begun, content, start, end)
    return [span for span in found if span is not None]
