"""What a VM is next started with, by its document: of a record that is not what the VM has as it runs."""

from collections.abc import Iterator
from dataclasses import replace

from qmpvcpu.domainxml.changes import with_map
from qmpvcpu.domainxml.domain import DomainVcpu, DomainVcpus
from qmpvcpu.errors import ConfigDeniedError, DomainXmlError
from qmpvcpu.model.previous import PreviousVcpus


def start_of(domain: DomainVcpus) -> DomainVcpus:
    """Return *domain* with the vCPUs that its VM is next started with.

    Of a record they are those of the next boot where one was asked for, else those of the earlier QEMU as long as
    they are kept, else those that the VM has; what stays keeps its place in the order. Idempotent.

    Raises:
        DomainXmlError: The next boot that was asked for is none of a VM with this maximum.
    """
    start = domain
    if domain.previous is not None:
        vcpus = tuple(_rows(domain.previous))
        start = replace(domain, vcpus=vcpus, individual=True, topology=domain.previous.topology)
    if domain.next_boot is not None:
        try:
            start = with_map(start, domain.next_boot)
        except ConfigDeniedError as error:
            raise DomainXmlError(f"the next boot that the record asks for cannot be: {error}") from error
    return replace(start, previous=None, next_boot=None)


def _rows(previous: PreviousVcpus) -> Iterator[DomainVcpu]:
    places = {vcpu: place for place, vcpu in enumerate(previous.order, start=1)}
    for each in range(previous.max):
        place = places.get(each)
        yield DomainVcpu(each, place is not None, place is None or place > previous.started_with, place)
