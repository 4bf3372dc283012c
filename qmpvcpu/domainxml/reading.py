"""Whose document it is, and what it holds that a record of ours does not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from uuid import UUID

from lxml import etree

from qmpvcpu.domainxml.cpumodel import CPU_MARK, is_as_written
from qmpvcpu.domainxml.domain import CpuModel
from qmpvcpu.domainxml.metadata import Metadata, find_record, read_metadata
from qmpvcpu.domainxml.nodes import line_of, parse_safely
from qmpvcpu.domainxml.rendering import NO_PCI_DEVICES
from qmpvcpu.errors import DomainXmlError

# Everything that render() writes, by the way from <domain> down, with its attributes: a document with more than this
# is not ours alone. Our own element is read, and checked, by itself.
_WRITTEN = {
    "domain": {"type"},
    "domain/name": set(),
    "domain/uuid": set(),
    "domain/metadata": set(),
    f"domain/metadata/{CPU_MARK}": {"model", "features"},
    "domain/memory": {"unit"},
    "domain/currentMemory": {"unit"},
    "domain/vcpu": {"placement", "current"},
    "domain/vcpus": set(),
    "domain/vcpus/vcpu": {"id", "enabled", "hotpluggable", "order"},
    "domain/os": set(),
    "domain/os/type": {"arch", "machine"},
    "domain/features": set(),
    "domain/features/acpi": set(),
    "domain/cpu": {"mode", "match", "check", "migratable"},
    "domain/cpu/model": {"fallback"},
    "domain/cpu/topology": {"sockets", "dies", "cores", "threads"},
    "domain/devices": set(),
    "domain/devices/emulator": set(),
}
# Of a hostile document each can be long, and there can be as many as it has tags.
_MOST_FOREIGN = 100
_NO_PCI = [(f"domain/devices/{node.tag}", dict(node.attributes)) for node in NO_PCI_DEVICES]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose document it is.

    Attributes:
        name: The VM's name.
        uuid: Lower-case text with dashes, or None where the document has none.
        metadata: Our own element, or None where it has none: the document was not written by us.
        foreign: What ``render`` never writes: names of elements (``disk``, ``cputune``, ...), of attributes
            (``vcpu cpuset``), and ``!--`` for a comment; at most 100 of them. To replace such a document by a
            rendered one would lose it.
    """

    name: str
    uuid: str | None
    metadata: Metadata | None
    foreign: tuple[str, ...] = ()


def read_identity(xml: bytes) -> Identity:
    """Tell whose document this is, without trusting it.

    Nothing is fetched or included, no entity is expanded, no document type is accepted, and what is built is bounded.
    The time it takes is in proportion to the size of *xml*.

    Returns:
        Name, uuid, our metadata if it has any, and what it holds that we would not write.

    Raises:
        DomainXmlError: Not well-formed (torn, empty, not UTF-8), too large, a document type, not a ``<domain>``, no
            name, our own element damaged, or written by a newer version; ``line`` says where.
    """
    root = parse_safely(xml)
    if root.tag != "domain":
        raise DomainXmlError(f"a <{root.tag}>, not a <domain>", line=line_of(root))
    name = root.findtext("name")
    if not name:
        raise DomainXmlError("the domain has no name", line=line_of(root))
    text = root.findtext("uuid")
    try:
        uuid = None if text is None else str(UUID(text.strip()))
    except ValueError as error:
        raise DomainXmlError(f"not a uuid: {error}", line=line_of(root)) from error
    metadata = root.find("metadata")
    record = None if metadata is None else find_record(metadata)
    return Identity(
        name=name,
        uuid=uuid,
        metadata=None if record is None else read_metadata(record),
        foreign=tuple(islice(_once(chain(_foreign_model(root), _foreign(root, "domain", record))), _MOST_FOREIGN)),
    )


def _once(names: Iterator[str]) -> Iterator[str]:
    seen = set()
    for name in names:
        if name not in seen:
            seen.add(name)
            yield name


def _foreign_model(root: etree._Element) -> Iterator[str]:
    """Tell whether somebody else has named the CPU model."""
    cpu = root.find("cpu")
    if cpu is None:
        return
    mode, name = cpu.get("mode"), cpu.findtext("model")
    if (mode or name) and not is_as_written(root, CpuModel(mode or "custom", name)):
        yield "cpu model"


def _foreign(element: etree._Element, way: str, ours: etree._Element | None) -> Iterator[str]:
    # Not items(): lxml looks for the value of each attribute among all of them.
    names = element.keys()
    if not any(way == known and _has(element, names, attributes) for known, attributes in _NO_PCI):
        if way not in _WRITTEN:
            yield str(element.tag)
            return
        yield from (f"{element.tag!s} {name!s}" for name in names if name not in _WRITTEN[way])
    if next(element.iterchildren(tag=etree.Comment), None) is not None:
        yield "!--"
    for child in element.iterchildren(tag=etree.Element):
        if child is not ours:
            yield from _foreign(child, f"{way}/{child.tag}", ours)


def _has(element: etree._Element, names: Sequence[object], attributes: Mapping[str, object]) -> bool:
    return len(names) == len(attributes) and all(element.get(name) == value for name, value in attributes.items())
