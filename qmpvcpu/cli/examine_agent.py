"""What ``doctor`` finds of a guest's agent."""

from collections import Counter
from collections.abc import Awaitable, Collection, Iterator
from typing import Final, TypeVar

from qmpvcpu.cli.findings import Finding, Level
from qmpvcpu.cli.guest import KNOWN_BY, READ_FILES, not_listed
from qmpvcpu.errors import AgentForbiddenError, GuestAgentError, GuestRefusedError
from qmpvcpu.model.guest import GuestVcpu
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap, named
from qmpvcpu.vm.controller import VcpuController

_T = TypeVar("_T")
# What each command of the agent is needed for.
_AGENT_COMMANDS: Final = (
    (("guest-get-vcpus",), "--proof online, guest and --offline-first cannot work"),
    (("guest-set-vcpus",), "it can bring no vCPU online, and take none offline first"),
    (
        ("guest-file-open", "guest-file-read", "guest-file-close"),
        "which CPU of the guest a vCPU is may stay unknown, and then nothing is done to it",
    ),
    (("guest-get-osinfo",), "it is not known whether it is Windows, which releases no vCPU"),
)
_ALLOW: Final = "allow it: block-rpcs or allow-rpcs in the guest's qemu-ga.conf, or qemu-ga's options -b and -a"


async def examine_agent(vm: VcpuController, timeout: float) -> list[Finding]:
    """Tell what the guest's agent may do, and what it tells; it has *timeout* seconds for each answer."""
    try:
        commands = await _or_none(vm.guest.commands(timeout=timeout))
        system = await _or_none(vm.guest.os(timeout=timeout))
        cpus = await _or_none(vm.guest.vcpus(timeout=timeout))
    except GuestAgentError as error:
        found = f"on {error.address}: {error.why}"
        return [Finding(Level.FAULT, "agent", found, error.hint or "see docs/guest-agent.md")]
    findings = [Finding(Level.OK, "agent", f"it answers{'' if system is None else f': {system}'}")]
    findings += _forbidden(commands)
    return findings if cpus is None else [*findings, *_examine_cpus(vm.layout, cpus)]


async def _or_none(question: Awaitable[_T]) -> _T | None:
    """Return the answer; None where the agent may not give it."""
    try:
        return await question
    except (AgentForbiddenError, GuestRefusedError):
        return None


def _forbidden(commands: Collection[str] | None) -> Iterator[Finding]:
    if commands is None:
        found = "it does not tell which commands it carries out (guest-info)"
        yield Finding(Level.NOTE, "agent", found, _ALLOW)
        return
    missing = [(sorted({*group} - {*commands}), what) for group, what in _AGENT_COMMANDS]
    for names, what in missing:
        if names:
            yield Finding(Level.WARNING, "agent", f"it does not carry out {', '.join(names)}: {what}", _ALLOW)
    if not any(names for names, _ in missing):
        yield Finding(Level.OK, "agent", "it carries out every command that is needed")


def _examine_cpus(layout: Layout, cpus: Collection[GuestVcpu]) -> Iterator[Finding]:
    by_vcpu = {cpu.vcpu: cpu for cpu in cpus if cpu.vcpu is not None}
    counts = Counter(cpu.known_by for cpu in cpus)
    known = ", ".join(f"{counts[how]} by {word}" for how, word in KNOWN_BY.items() if word and counts[how])
    unknown = [str(cpu.number) for cpu in cpus if cpu.vcpu is None]
    if known:
        yield Finding(Level.OK, "guest's CPUs", f"which vCPU each is: {known}")
    if unknown:
        found = (
            f"it is not known which vCPU the guest's CPU {', '.join(unknown)} is: it is neither proven nor changed"
        )
        yield Finding(Level.WARNING, "guest's CPUs", found, READ_FILES)
    elif missing := not_listed(cpus, layout):
        found = f"{named(missing)}: plugged, but not in the guest's list"
        yield Finding(Level.WARNING, "guest's CPUs", found, "docs/what-happens.md says what keeps a guest from it")
    if offline := VcpuMap(vcpu for vcpu, cpu in by_vcpu.items() if not cpu.online):
        yield Finding(Level.NOTE, "guest's CPUs", f"{named(offline)}: offline", f"qmpvcpu guest online {offline}")
