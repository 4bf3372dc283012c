"""The demo: every verdict of the library on a VM of its own, step by step, each compared with what was expected."""

import asyncio
import contextlib
import enum
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from qmpvcpu.domainxml import render
from qmpvcpu.errors import QmpVcpuError, counted
from qmpvcpu.events import VcpuUnplugged
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Proof
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Pending, Plugged, Refused, Unplugged, Verdict, verdict_of
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.microguest import MicroGuest
from qmpvcpu.testing.qemu import QemuNotFoundError, best_qemu, qemu_named
from qmpvcpu.testing.rom import Behaviour
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.subscribers import EventStream

# A narrower terminal has several lines for each step.
_WIDE: Final = 78
_VM_NAME: Final = "qmpvcpu-demo"
_TIMEOUT: Final = 30.0  # for what is expected to be answered at once
_STYLES: Final = {"PLUGGED": "green", "UNPLUGGED": "green", "REFUSED": "yellow", "PENDING": "yellow"}
_MAX_VCPUS: Final = 8


class GuestKind(enum.Enum):
    """Which guest the demo runs; the value is what the command line calls it."""

    MICROGUEST = "microguest"
    LINUX = "linux"


_STARTING: Final = {
    GuestKind.MICROGUEST: "a VM with the micro-guest",
    GuestKind.LINUX: "a VM with Linux in it (a few seconds where KVM does not run it)",
}


class Stage(Protocol):
    """Where the demo is shown.

    Attributes:
        done: JSON of the steps so far.
    """

    done: list[dict[str, Any]]

    def attach(self, target: Path, *, name: str) -> AbstractAsyncContextManager[VcpuController]:
        """Attach to the VM at *target*."""

    def note(self, line: str) -> None:
        """Show on standard error what goes on."""

    def say(self, *parts: str | tuple[str, str]) -> None:
        """Show one line made of *parts*, each a text or a text with its style."""


@dataclass(frozen=True)
class Step:
    """One step of the story, as it went.

    Attributes:
        call: What was asked, as the command line says it.
        expected: The verdict's word that was expected.
        verdict: What came.
        note: What is to be seen in it.
        layout: The VM after it.
        online: The CPUs that the guest says it runs on after it (its own numbers), or None where it has no words.
        late: Whether the answer came after a deadline had passed; None where nobody waits for that.
    """

    call: str
    expected: str
    verdict: Verdict
    note: str
    layout: Layout
    online: VcpuMap | None
    late: bool | None = None

    @property
    def as_expected(self) -> bool:
        """True if the verdict is the expected one, and the guest sees as many CPUs as are plugged."""
        agreed = self.online is None or len(self.online) == len(self.layout.enabled)
        return self.verdict.name == self.expected and agreed and self.late is not False


@dataclass(frozen=True)
class Demo:
    """How the demo went.

    Attributes:
        content: All of it as JSON.
        layout: The VM at the end.
        xml: The same as libvirt's domain XML.
        differences: What went otherwise than expected, in sentences.
    """

    content: dict[str, Any]
    layout: Layout
    xml: str
    differences: tuple[str, ...]


async def _hesitate(guest: MicroGuest | LinuxGuest) -> float:
    """Have the guest take its time over removals; return the seconds to wait for one in vain."""
    if isinstance(guest, MicroGuest):
        await guest.set_behaviour(Behaviour.hanging())
        return 0.2
    return 0.0  # Linux takes tens of milliseconds in any case


async def _online(guest: MicroGuest | LinuxGuest, expected: int) -> VcpuMap | None:
    """The CPUs that the guest says it runs on, by its own numbers, once there are *expected*; None: it cannot say."""
    if isinstance(guest, MicroGuest):
        return None
    try:
        return await guest.wait_online(lambda cpus: len(cpus) == expected)
    except QmpVcpuError:
        return await guest.online()


async def play(stage: Stage, kind: GuestKind, qemu: str | None) -> Demo:
    """Start a VM, and play the story on it until a step goes otherwise than expected.

    Args:
        stage: Where it is shown.
        kind: The guest.
        qemu: The QEMU to run; None: ``QMPVCPU_QEMU``, else the newest that is found.

    Raises:
        QmpVcpuError: There is no QEMU, it or the guest does not come up, or the story broke off.
    """
    started = time.monotonic()
    binary, why = choose_qemu(qemu)
    guest_class = LinuxGuest if kind is GuestKind.LINUX else MicroGuest
    stage.note(f"starting {_STARTING[kind]} ...")
    differences: list[str] = []
    async with (
        guest_class(binary, boot=1, max_vcpus=_MAX_VCPUS) as guest,
        stage.attach(guest.qmp, name=_VM_NAME) as vm,
    ):
        version = ".".join(map(str, vm.capabilities.qemu_version))
        stage.say(f"QEMU {version} under {guest.accelerator.upper()}: {binary} ({why})")
        stage.say("")
        stage.say(f"{'':9} {vm.layout} at the start")
        async for step in _play(vm, guest):
            stage.done.append(_step_json(step))
            _say_step(stage, step)
            if not step.as_expected:
                differences.append(_difference(step))
                break
        layout = vm.layout
    xml = render(layout, emulator=str(binary)).decode()
    content: dict[str, Any] = {
        "guest": kind.value,
        "qemu": {"path": str(binary), "version": version, "chosen": why},
        "accelerator": guest.accelerator,
        "as_expected": not differences,
        "differences": differences,
        "steps": stage.done,
        "seconds": round(time.monotonic() - started, 3),
        "xml": xml,
    }
    return Demo(content, layout, xml, tuple(differences))


def choose_qemu(qemu: str | None) -> tuple[Path, str]:
    """Return the QEMU to run and why it is that one."""
    if qemu is None:
        named = "named by QMPVCPU_QEMU" if os.environ.get("QMPVCPU_QEMU") else "the newest found"
        return best_qemu().absolute(), named
    found = qemu_named(qemu)
    if found is None:
        raise QemuNotFoundError(f"--qemu {qemu}: no program that can be run")
    return found, "named by --qemu"


async def _play(vm: VcpuController, guest: MicroGuest | LinuxGuest) -> AsyncIterator[Step]:
    # All plugs come first: QEMU before 10 does not survive one after an unplug under TCG.
    yield await _plug(vm, guest, 3, "1 and 2 stay out: a hole")
    yield await _plug(vm, guest, 6, "another hole")
    yield await _plug(vm, guest, 5, "")
    yield await _plug(vm, guest, None, "the first free one")
    yield await _unplug(vm, guest, 6, "UNPLUGGED", "proven, not assumed")
    await guest.refuse()
    yield await _unplug(vm, guest, 5, "REFUSED", "")
    await guest.comply()
    yield await _unplug(vm, guest, 5, "UNPLUGGED", "same call, obstacle gone")
    events = vm.events()
    patience = await _hesitate(guest)
    yield await _unplug(vm, guest, 1, "PENDING", "deadline passed", limit=patience, settle=False)
    await guest.comply()
    yield await _late_answer(vm, guest, events)


async def _plug(vm: VcpuController, guest: MicroGuest | LinuxGuest, vcpu: int | None, note: str) -> Step:
    started = time.monotonic()

    async def act() -> Verdict:
        ids = await vm.plug(vcpu, proof=Proof.ACKNOWLEDGED, timeout=_TIMEOUT)
        return Plugged(ids, vm.layout[min(ids)].acknowledged, seconds=time.monotonic() - started)

    verdict = await _verdict(act())
    call = "plug" if vcpu is None else f"plug {vcpu}"
    return Step(call, Plugged.name, verdict, note, vm.layout, await _online(guest, len(vm.layout.enabled)))


async def _unplug(
    vm: VcpuController,
    guest: MicroGuest | LinuxGuest,
    vcpu: int,
    expected: str,
    note: str,
    *,
    limit: float = _TIMEOUT,
    settle: bool = True,
) -> Step:
    async def act() -> Verdict:
        request = await vm.request_unplug(vcpu)
        return await request.wait(limit)

    verdict = await _verdict(act())
    layout = vm.layout
    match verdict:
        case Refused(code=int(code)):
            note = f"{code:#04x} {verdict.reason}"
        case Pending(acknowledged=True):
            note = "the guest works on it"
    # Of a guest in the middle of letting a CPU go, no number is the right one.
    online = await _online(guest, len(layout.enabled)) if settle else None
    return Step(f"unplug {vcpu}", expected, verdict, note, layout, online)


async def _late_answer(vm: VcpuController, guest: MicroGuest | LinuxGuest, events: EventStream) -> Step:
    """Wait for what nobody asks for any more; the library tells it as an event."""
    pending = vm.layout.pending
    verdict: Verdict = Pending(pending, acknowledged=False, seconds=_TIMEOUT)
    late = False
    clock = asyncio.get_running_loop().time
    with contextlib.suppress(TimeoutError):  # then it is still pending, which is not what was expected
        async with asyncio.timeout(_TIMEOUT):
            async for event in events:
                if isinstance(event, VcpuUnplugged):
                    asked = event.requested_at
                    verdict = Unplugged(event.ids, seconds=0.0 if asked is None else clock() - asked)
                    late = event.late
                    break
    online = await _online(guest, len(vm.layout.enabled))
    return Step("(event)", Unplugged.name, verdict, "the late answer", vm.layout, online, late=late)


async def _verdict(action: Awaitable[Verdict]) -> Verdict:
    """Return how *action* ended; an error that is no verdict ends the demo."""
    try:
        return await action
    except QmpVcpuError as error:
        verdict = verdict_of(error)
        if verdict is None:
            raise
        return verdict


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "call": step.call,
        "verdict": to_json(step.verdict),
        "late": bool(step.late),
        "expected": step.expected.lower(),
        "map": str(step.layout.enabled),
        "pending": str(step.layout.pending),
        "guest_online": None if step.online is None else str(step.online),
    }


def _say_step(stage: Stage, step: Step) -> None:
    took = f"{getattr(step.verdict, 'seconds', 0.0) * 1000:.1f} ms"
    sees = "" if step.online is None else f"  guest: {step.online!s:7}"
    style = _STYLES[step.expected] if step.as_expected else "bold red"
    word = (f"{step.verdict.name:9}", style)
    if shutil.get_terminal_size().columns > _WIDE:
        stage.say(f"{step.call:9} {step.layout} ", word, f" {took:>7}{sees}  {step.note}".rstrip())
        return
    stage.say(f"{step.call:9} {step.layout}")
    stage.say(f"{'':10}", word, f" {took:>7}{sees}")
    if step.note:
        stage.say(f"{'':10}{step.note}")


def _difference(step: Step) -> str:
    if step.late is False:
        return f"{step.call}: expected a late answer, got {step.verdict} in time"
    if step.verdict.name != step.expected:
        return f"{step.call}: expected {step.expected}, got {step.verdict}"
    return (
        f"{step.call}: {counted(len(step.layout.enabled), 'vCPU')} plugged, the guest says it runs on {step.online}"
    )
