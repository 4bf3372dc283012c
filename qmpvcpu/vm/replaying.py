"""What a replay is to rebuild, taken from whatever says it."""

from typing import TYPE_CHECKING

from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.layout import Layout
from qmpvcpu.planning.replay import ReplayTarget

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpus


def wanted_of(source: "DomainVcpus | Layout | PreviousVcpus | bytes") -> ReplayTarget:
    """Return what *source* says that a VM is to be started with.

    Raises:
        DomainXmlError: It is no domain document that can be read.
        TypeError: It is text, which may be a path or a document.
    """
    if isinstance(source, Layout):
        return _of_layout(source)
    if isinstance(source, PreviousVcpus):
        later = tuple(each for each in source.order if each not in source.started_with)
        return ReplayTarget(max=source.max, started_with=source.started_with, later=later, topology=source.topology)
    if isinstance(source, str):
        raise TypeError("a domain document is bytes: read the file, or encode the text")
    # Here, and not above: XML is a part of the time that importing us would take, and few replay.
    from qmpvcpu.domainxml import parse, start_of
    from qmpvcpu.domainxml.cpu import qemu_model

    source = start_of(parse(source) if isinstance(source, bytes) else source)
    return ReplayTarget(
        max=source.max,
        started_with=source.started_with,
        later=source.order,
        topology=source.topology,
        cells={each: cell.id for cell in source.numa for each in cell.cpus},
        model=None if source.cpu is None else qemu_model(source, source.arch or ""),
    )


def _of_layout(layout: Layout) -> ReplayTarget:
    boot = layout.started_with
    return ReplayTarget(
        max=layout.max,
        started_with=boot,
        later=tuple(each for first in layout.order if first not in boot for each in layout.slot_of(first).ids),
        topology=layout.vm.topology,
        slots=layout.slots,
    )
