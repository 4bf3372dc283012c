"""The state of each vCPU as ``<vcpus>`` says it: from a layout, and to text."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qmpvcpu.domainxml.domain import DomainVcpu, DomainVcpus
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.layout import Layout

_YES_OR_NO = {True: "yes", False: "no"}


def domain_of(layout: Layout, base: DomainVcpus) -> DomainVcpus:
    """Return what a document says, with the live state of a VM in the place of the state that it tells.

    Which vCPUs are enabled, which of them are hotpluggable, and their order are *layout*'s; all else is *base*'s.

    Args:
        layout: The live state.
        base: What the VM's document says.

    Raises:
        DomainXmlError: They are of two VMs (both have a uuid, and not the same one), or of another number of possible
            vCPUs; vCPU 0 is not plugged.
    """
    ours = layout.vm.uuid
    if ours is not None and base.uuid is not None and ours != base.uuid:
        raise DomainXmlError(f"the document is that of a VM with uuid {base.uuid}, not {ours}")
    if base.max != layout.max:
        raise DomainXmlError(f"the document says that there can be {base.max} vCPUs, and QEMU has {layout.max}")
    vcpus = tuple(vcpus_of(layout))
    individual = base.individual or needs_rows(vcpus)
    return replace(base, vcpus=vcpus, individual=individual, previous=None, next_boot=None)


def vcpus_of(layout: Layout) -> Iterator[DomainVcpu]:
    """Return every possible vCPU, by id, so that a VM started from them has the same ones, created in the same order.

    Raises:
        DomainXmlError: vCPU 0 is not plugged.
    """
    if not layout.slots or not layout.slots[0].present:
        raise DomainXmlError("vCPU 0 is not plugged: libvirt has no such domain")
    places = {first: place for place, first in enumerate(layout.creation)}
    # Counted here, over what is plugged and nothing else, vCPU 0 first as libvirt wants it: libvirt's own numbers go
    # stale or double when a removal completes late, and such a document cannot be restored from.
    present = sorted(
        (slot for slot in layout.slots if slot.present),
        key=lambda slot: (slot.first != 0, places.get(slot.first, len(places)), slot.first),
    )
    order = {slot.first: place for place, slot in enumerate(present, start=1)}
    started_with = len(layout.started_with)
    for index, slot in enumerate(layout.slots):
        for each in range(slot.first, slot.first + slot.count):
            yield DomainVcpu(each, slot.present, index >= started_with, order.get(slot.first))


def row(vcpu: DomainVcpu) -> str:
    """Return one row of ``<vcpus>`` as libvirt prints it."""
    order = f" order='{vcpu.order}'" if vcpu.order else ""
    enabled, hotpluggable = _YES_OR_NO[vcpu.enabled], _YES_OR_NO[vcpu.hotpluggable]
    return f"<vcpu id='{vcpu.id}' enabled='{enabled}' hotpluggable='{hotpluggable}'{order}/>"


def needs_rows(vcpus: Sequence[DomainVcpu]) -> bool:
    """Return True if ``<vcpu current>`` cannot say it: there is a hole, or an enabled vCPU that is hotpluggable."""
    enabled = sum(vcpu.enabled for vcpu in vcpus)
    return any(vcpu.enabled != (vcpu.id < enabled) or vcpu.hotpluggable == vcpu.enabled for vcpu in vcpus)


def creation_of(vcpus: Sequence[DomainVcpu]) -> list[int]:
    """Return the enabled vCPUs in the order in which libvirt has QEMU create them."""
    enabled = [vcpu for vcpu in vcpus if vcpu.enabled]
    enabled.sort(key=lambda vcpu: (vcpu.hotpluggable, vcpu.hotpluggable and (vcpu.order or 0), vcpu.id))
    return [vcpu.id for vcpu in enabled]
