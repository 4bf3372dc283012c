"""The elements of a domain document as libvirt prints them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qmpvcpu.domainxml.domain import DomainVcpu
from qmpvcpu.errors import DomainXmlError

# XML 1.0 cannot hold these, save for tab and line breaks, which libvirt refuses in a name.
_UNWRITABLE = re.compile("[^\x20-\x7e\x80-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
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


NO_PCI_DEVICES = (Node("controller", {"type": "usb", "model": "none"}), Node("memballoon", {"model": "none"}))


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


_YES_OR_NO = {True: "yes", False: "no"}


def row(vcpu: DomainVcpu) -> str:
    """Return one row of ``<vcpus>`` as libvirt prints it."""
    order = f" order='{vcpu.order}'" if vcpu.order else ""
    enabled, hotpluggable = _YES_OR_NO[vcpu.enabled], _YES_OR_NO[vcpu.hotpluggable]
    return f"<vcpu id='{vcpu.id}' enabled='{enabled}' hotpluggable='{hotpluggable}'{order}/>"
