"""A document's host CPUs and schedulers as a ``Placement``, and the way back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from qmpvcpu.domainxml.domain import DomainVcpus, ThreadSched
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.placement import Place, Placement, SchedPolicy, Scheduler

# libvirt has no word for the kernel's default: what is not said is that.
_POLICIES: Final = {each.value: each for each in SchedPolicy if each is not SchedPolicy.OTHER}


def placement_of(domain: DomainVcpus) -> Placement:
    """Return where libvirt would run the threads of *domain*, and how it would schedule them.

    A vCPU's ``<vcpupin>`` wins over ``<vcpu cpuset>``, and so does ``<emulatorpin>`` for the emulator threads. If
    neither is there, libvirt runs a thread on all host CPUs: ``everywhere`` is True if any thread has a place. Pins
    and schedulers of unplugged vCPUs take effect when they are plugged. A vCPU without ``<vcpusched>`` inherits the
    scheduler of QEMU's main thread, which is that of ``<emulatorsched>`` if the vCPU is plugged later.

    Under ``placement='auto'`` libvirt asks numad, and no document holds the answer: threads without a pin have no
    host CPUs here, and ``everywhere`` is False, so a vCPU runs where libvirt has put QEMU's main thread.
    ``domain.placement`` shows that case.

    Raises:
        DomainXmlError: A priority is not 1 to 99: libvirt defines such a domain, but cannot schedule its threads.

    Source: libvirt src/qemu/qemu_process.c, qemuProcessSetupPid; measured with libvirt 9.0.0.

    Example:
        >>> from qmpvcpu.domainxml import parse
        >>> pin = b"<cputune><vcpupin vcpu='1' cpuset='8-11'/></cputune>"
        >>> domain = parse(b"<domain type='kvm'><name>a</name><vcpu cpuset='0-7'>2</vcpu>" + pin + b"</domain>")
        >>> placement = placement_of(domain)
        >>> str(placement.of_vcpu(0)), str(placement.of_vcpu(1))
        ('host CPUs 0-7', 'host CPUs 8-11')
    """
    vcpus = {
        each: Place(domain.pins.get(each), _scheduler(domain.scheds.get(each), f"<vcpusched> of vCPU {each}"))
        for each in sorted({*domain.pins, *domain.scheds})
    }
    emulator = Place(domain.emulator_pin, _scheduler(domain.emulator_sched, "<emulatorsched>"))
    found = Placement(vcpus, emulator, domain.cpuset)
    return replace(found, everywhere=bool(found) and domain.placement == "static")


def with_placement(domain: DomainVcpus, placement: Placement) -> DomainVcpus:
    """Return *domain* with the pins, schedulers and ``<vcpu cpuset>`` of *placement*, and no others.

    ``placement='auto'`` stays unless there is a cpuset, which libvirt does not read under it. What a
    document cannot express is left out (core scheduling, ``exclusive``, the policy, and the scheduler ``other``, the
    kernel's default), and so are the places of vCPUs that *domain* cannot have.
    """
    possible = {vcpu: place for vcpu, place in sorted(placement.vcpus.items()) if vcpu < domain.max}
    scheds = {vcpu: _sched(place.scheduler) for vcpu, place in possible.items()}
    return replace(
        domain,
        placement=domain.placement if placement.cpuset is None else "static",
        cpuset=placement.cpuset,
        pins={vcpu: place.cpus for vcpu, place in possible.items() if place.cpus is not None},
        emulator_pin=placement.emulator.cpus,
        scheds=_said(scheds),
        emulator_sched=_sched(placement.emulator.scheduler),
    )


def with_places_of(domain: DomainVcpus, other: DomainVcpus) -> DomainVcpus:
    """Return *domain* with the pins, schedulers and cpuset of *other*."""
    return replace(
        domain,
        placement=other.placement,
        cpuset=other.cpuset,
        pins=other.pins,
        emulator_pin=other.emulator_pin,
        scheds=other.scheds,
        emulator_sched=other.emulator_sched,
    )


def has_same_places(domain: DomainVcpus, other: DomainVcpus) -> bool:
    """Return True if *domain* and *other* say the same of where threads run and how they are scheduled."""
    return with_places_of(domain, other) == domain


def _scheduler(sched: ThreadSched | None, where: str) -> Scheduler | None:
    if sched is None:
        return None
    try:
        return Scheduler(_POLICIES[sched.scheduler], sched.priority)
    except ValueError as error:
        raise DomainXmlError(f"{where}: {error}; libvirt defines it, and refuses to schedule a thread so") from None


def _sched(scheduler: Scheduler | None) -> ThreadSched | None:
    if scheduler is None or scheduler.policy is SchedPolicy.OTHER:
        return None
    return ThreadSched(scheduler.policy.value, scheduler.priority)


def _said(scheds: Mapping[int, ThreadSched | None]) -> dict[int, ThreadSched]:
    return {vcpu: sched for vcpu, sched in scheds.items() if sched is not None}
