"""The elements of a domain document as libvirt prints them."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from qmpvcpu.domainxml.domain import LEVELS, DomainVcpu, DomainVcpus, ThreadSched
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vm import Topology

# XML 1.0 cannot hold the characters between these, except for tab and line breaks, which libvirt refuses in a name.
_WRITABLE: Final = ("\x20\x7e", "\x80\ud7ff", "\ue000\ufffd", "\U00010000\U0010ffff")
# A shortcut for nearly every text: each vCPU has some.
_PLAIN: Final = re.compile("[\\w./:,-]*", re.ASCII)
_ESCAPES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"})
_YES_OR_NO: Final = {True: "yes", False: "no"}


class Node(NamedTuple):
    """An element to be written.

    Attributes:
        tag: Its name, with its prefix.
        attributes: By name, in the order in which they are written.
        content: Text, or child elements; a child that is a string is a line ready to be written.
    """

    tag: str
    attributes: Mapping[str, object] = MappingProxyType({})
    content: "str | tuple[Node | str, ...]" = ()


NO_PCI_DEVICES: Final = (Node("controller", {"type": "usb", "model": "none"}), Node("memballoon", {"model": "none"}))
"""libvirt adds a USB controller and a balloon on PCI unless told not to, and refuses a machine without PCI then."""


def write(node: Node) -> bytes:
    """Return *node* as libvirt would write it, without XML declaration, in UTF-8.

    Raises:
        DomainXmlError: A text holds a character that XML cannot.
    """
    lines: list[str] = []
    _write(node, "", lines.append)
    lines.append("")
    return "\n".join(lines).encode()


def vcpu_row(vcpu: DomainVcpu) -> str:
    """Return one row of ``<vcpus>``."""
    order = f" order='{vcpu.order}'" if vcpu.order else ""
    enabled, hotpluggable = _YES_OR_NO[vcpu.enabled], _YES_OR_NO[vcpu.hotpluggable]
    return f"<vcpu id='{vcpu.id}' enabled='{enabled}' hotpluggable='{hotpluggable}'{order}/>"


def topology_node(topology: Topology) -> Node:
    """Return ``<topology>``; libvirt before 10.1 does not know clusters."""
    sizes = {level: getattr(topology, level) for level in LEVELS}
    return Node("topology", {level: size for level, size in sizes.items() if level != "clusters" or size > 1})


def cputune_nodes(domain: DomainVcpus) -> tuple[Node, ...]:
    """Return the children of ``<cputune>`` that say where threads run, and how they are scheduled."""
    nodes = [Node("vcpupin", {"vcpu": vcpu, "cpuset": cpus}) for vcpu, cpus in sorted(domain.pins.items())]
    if domain.emulator_pin is not None:
        nodes.append(Node("emulatorpin", {"cpuset": domain.emulator_pin}))
    if domain.emulator_sched is not None:
        nodes.append(Node("emulatorsched", sched_attributes(domain.emulator_sched)))
    scheds = sorted(domain.scheds.items())
    nodes += [Node("vcpusched", {"vcpus": vcpu, **sched_attributes(sched)}) for vcpu, sched in scheds]
    return tuple(nodes)


def sched_attributes(sched: ThreadSched) -> Mapping[str, object]:
    """Return how a thread is scheduled as attributes of ``<vcpusched>`` or ``<emulatorsched>``."""
    given = {"scheduler": sched.scheduler, "priority": sched.priority}
    return {name: value for name, value in given.items() if value is not None}


def _write(node: Node, indent: str, put: Callable[[str], None]) -> None:
    # libvirt writes its own elements in single quotes; foreign metadata goes to libxml2, which writes double ones.
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
            if isinstance(child, str):  # here, and not by recursion: there is a line for each vCPU
                put(inner + child)
            else:
                _write(child, inner, put)
        put(f"{indent}</{node.tag}>")


def _escaped(value: object) -> str:
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    if not all(any(first <= each <= last for first, last in _WRITABLE) for each in text):
        raise DomainXmlError(f"{text!r} holds a character that a libvirt document cannot")
    return text.translate(_ESCAPES)
