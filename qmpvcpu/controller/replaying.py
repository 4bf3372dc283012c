"""What a replay is to rebuild, taken from whatever says it."""

from typing import TYPE_CHECKING

from qmpvcpu.model import Layout, VcpuMap
from qmpvcpu.planning import Wanted

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpus

__all__ = ["wanted_of"]


def wanted_of(source: "DomainVcpus | Layout | bytes") -> Wanted:
    """Return what *source* says of a VM's vCPUs.

    Raises:
        DomainXmlError: It is no domain document that can be read.
        TypeError: It is text, which may be a path or a document.
    """
    if isinstance(source, Layout):
        return _of_layout(source)
    if isinstance(source, str):
        raise TypeError("a domain document is bytes: read the file, or encode the text")
    if isinstance(source, bytes):
        # Here, and not above: XML is a part of the time that importing us would take, and few replay.
        from qmpvcpu.domainxml import parse  # noqa: PLC0415

        source = parse(source)
    from qmpvcpu.domainxml.cpumodel import qemu_model  # noqa: PLC0415 -- as above

    return Wanted(
        max=source.max,
        boot=source.started_with,
        later=source.order,
        topology=source.topology,
        cells={each: cell.id for cell in source.numa for each in cell.cpus},
        model=None if source.cpu is None else qemu_model(source, source.arch or ""),
    )


def _of_layout(layout: Layout) -> Wanted:
    boot = layout.started_with
    return Wanted(
        max=layout.max,
        boot=VcpuMap(each for first in boot for each in layout.slot_of(first).ids),
        later=tuple(each for first in layout.order[len(boot) :] for each in layout.slot_of(first).ids),
        topology=layout.vm.topology,
        slots=layout.slots,
    )
