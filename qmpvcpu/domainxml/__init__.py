"""Floor 3: libvirt's ``<domain>``, and the only door to lxml. Pure: bytes in, bytes out.

``render`` writes the live state as libvirt itself would print it, so that ``virsh define`` accepts it and a VM
started from it has the same vCPUs, created in the same order. ``parse`` reads the vCPU side of any domain document as
libvirt does, to a ``DomainVcpus``; ``validate`` names every libvirt rule that it breaks; ``update`` changes what it
says about vCPUs, and no other byte; ``start_of`` returns what a VM is next started with. ``read_identity`` returns
whose document it is, and our own element in it (``metadata``).

Source: libvirt formatdomain, "CPU Allocation" and "CPU model and topology"; the rules of ``<vcpus>`` as measured
with libvirt 9.0.0 (define, start, dumpxml) on QEMU 7.2.22 and 10.0.2.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.domainxml.domain import CpuModel, DomainVcpu, DomainVcpus, NumaCell, ThreadSched
    from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
    from qmpvcpu.domainxml.live_state import domain_from, domain_of, omissions, render
    from qmpvcpu.domainxml.next_boot import start_of
    from qmpvcpu.domainxml.patch import update
    from qmpvcpu.domainxml.placing import placement_of, with_placement
    from qmpvcpu.domainxml.reader import Identity, parse, read_identity
    from qmpvcpu.domainxml.record_element import NAMESPACE, Instance, Metadata
    from qmpvcpu.domainxml.rules import validate

# A name is imported when it is first used: few users need all of it.
_HOMES = {
    "qmpvcpu.domainxml.domain": "CpuModel DomainVcpu DomainVcpus NumaCell ThreadSched",
    "qmpvcpu.domainxml.domainrule": "DomainRule RuleStage",
    "qmpvcpu.domainxml.live_state": "domain_from domain_of omissions render",
    "qmpvcpu.domainxml.next_boot": "start_of",
    "qmpvcpu.domainxml.patch": "update",
    "qmpvcpu.domainxml.placing": "placement_of with_placement",
    "qmpvcpu.domainxml.reader": "Identity parse read_identity",
    "qmpvcpu.domainxml.record_element": "Instance Metadata NAMESPACE",
    "qmpvcpu.domainxml.rules": "validate",
}

__all__ = [
    "NAMESPACE",
    "CpuModel",
    "DomainRule",
    "DomainVcpu",
    "DomainVcpus",
    "Identity",
    "Instance",
    "Metadata",
    "NumaCell",
    "RuleStage",
    "ThreadSched",
    "domain_from",
    "domain_of",
    "omissions",
    "parse",
    "placement_of",
    "read_identity",
    "render",
    "start_of",
    "update",
    "validate",
    "with_placement",
]

if not TYPE_CHECKING:  # so that type checkers still find a name that is missing
    __getattr__, __dir__ = lazily(__name__, _HOMES)
