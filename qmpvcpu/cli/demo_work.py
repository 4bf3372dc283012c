"""The demo: every verdict of the library on a VM of its own, step by step, each held against what was expected."""

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
from typing import Any, Protocol

from qmpvcpu.cli.answer import NOT_REACHED, REACHED, Answer
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.guests import LinuxDemoGuest, MicroDemoGuest
from qmpvcpu.cli.show import map_row, milliseconds, state_json
from qmpvcpu.domainxml import render
from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.events import VcpuUnplugged
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Pending, Plugged, Proof, Refused, Unplugged, Verdict, as_json, verdict_of
from qmpvcpu.testing.qemu import QemuNotFoundError, best_qemu
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.stream import EventStream

# A narrower terminal has several lines for each step.
_WIDE = 78
_VM_NAME = "qmpvcpu-demo"
_TIMEOUT = 30.0  # for what is expected to be answered at once
_STYLES = {"PLUGGED": "green", "UNPLUGGED": "green", "REFUSED": "yellow", "PENDING": "yellow"}


class GuestKind(enum.Enum):
    """Which guest the demo runs; the value is what the command line calls it."""

    MICROGUEST = "microguest"
    LINUX = "linux"


class Stage(Protocol):
    """Where the demo is shown: the command line's stage, or plain words where that is not installed.

    Attributes:
        done: JSON of the steps so far.
    """

    done: list[dict[str, Any]]

    def attach(self, target: Path, *, name: str) -> AbstractAsyncContextManager[VcpuController]:
        """Attach to the VM at *target*."""

    def note(self, line: str) -> None:
        """Tell what goes on."""

    def say(self, line: str) -> None:
        """Show *line*."""

    def say_styled(self, *parts: str | tuple[str, str]) -> None:
        """Show *parts*, each a text or a text with its style, as one line."""


@dataclass(frozen=True, slots=True)
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


async def demo(stage: Stage, kind: GuestKind, qemu: Path | None) -> Answer:
    """Start a VM, play the story on it, and show its XML.

    Raises:
        QmpVcpuError: There is no QEMU, it or the guest does not come up, or the story broke off.
    """
    started = time.monotonic()
    binary, why = _choose(qemu)
    guest = LinuxDemoGuest(binary) if kind is GuestKind.LINUX else MicroDemoGuest(binary)
    stage.note(f"starting {guest.name} ...")
    differences: list[str] = []
    async with guest, stage.attach(guest.qmp, name=_VM_NAME) as vm:
        version = ".".join(map(str, vm.capabilities.qemu_version))
        _say_head(stage, vm.layout, f"QEMU {version} under {guest.accelerator.upper()}: {binary} ({why})")
        async for step in _play(vm, guest):
            stage.done.append(_step_json(step))
            _say_step(stage, step)
            if not step.as_expected:
                differences.append(_difference(step))
                break
        layout = vm.layout
    xml = render(layout, emulator=str(binary)).decode()
    code = NOT_REACHED if differences else REACHED
    content = document(
        guest=kind.value,
        qemu={"path": str(binary), "version": version, "chosen": why},
        accelerator=guest.accelerator,
        as_expected=not differences,
        differences=differences,
        steps=stage.done,
        **state_json(layout),
        seconds=round(time.monotonic() - started, 3),
        xml=xml,
    )
    stage.say("\nThe state as libvirt's domain XML (virsh define takes it):\n")
    return Answer(code, content, xml.rstrip("\n"), complaint=tuple(differences))


def _choose(qemu: Path | None) -> tuple[Path, str]:
    """Return the QEMU to run and why it is that one."""
    if qemu is None:
        named = "named by QMPVCPU_QEMU" if os.environ.get("QMPVCPU_QEMU") else "the newest found"
        return best_qemu().absolute(), named
    found = shutil.which(qemu)
    if found is None:
        raise QemuNotFoundError(f"--qemu {qemu}: no program that can be run")
    return Path(found).absolute(), "named by --qemu"


async def _play(vm: VcpuController, guest: MicroDemoGuest | LinuxDemoGuest) -> AsyncIterator[Step]:
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
    await guest.hesitate()
    yield await _unplug(vm, guest, 1, "PENDING", "deadline passed", limit=guest.patience, settle=False)
    await guest.comply()
    yield await _late_answer(vm, guest, events)


async def _plug(vm: VcpuController, guest: MicroDemoGuest | LinuxDemoGuest, vcpu: int | None, note: str) -> Step:
    started = time.monotonic()

    async def act() -> Verdict:
        ids = await vm.plug(vcpu, proof=Proof.ACKNOWLEDGED, timeout=_TIMEOUT)
        return Plugged(ids, vm.layout[min(ids)].acknowledged, seconds=time.monotonic() - started)

    verdict = await _verdict(act())
    call = "plug" if vcpu is None else f"plug {vcpu}"
    return Step(call, Plugged.name, verdict, note, vm.layout, await guest.online(len(vm.layout.enabled)))


async def _unplug(
    vm: VcpuController,
    guest: MicroDemoGuest | LinuxDemoGuest,
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
    online = await guest.online(len(layout.enabled)) if settle else None
    return Step(f"unplug {vcpu}", expected, verdict, note, layout, online)


async def _late_answer(vm: VcpuController, guest: MicroDemoGuest | LinuxDemoGuest, events: EventStream) -> Step:
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
    online = await guest.online(len(vm.layout.enabled))
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
        **as_json(step.verdict),
        "late": bool(step.late),
        "expected": step.expected,
        "map": str(step.layout.enabled),
        "pending": str(step.layout.pending),
        "guest_online": None if step.online is None else str(step.online),
    }


def _say_head(stage: Stage, layout: Layout, words: str) -> None:
    stage.say(words)
    stage.say(f"\n{'':9} {map_row(layout)} at the start")


def _say_step(stage: Stage, step: Step) -> None:
    seconds = milliseconds(getattr(step.verdict, "seconds", 0.0))
    sees = "" if step.online is None else f"  guest: {step.online!s:7}"
    style = _STYLES[step.expected] if step.as_expected else "bold red"
    word = (f"{step.verdict.name:9}", style)
    if shutil.get_terminal_size().columns > _WIDE:
        said = f" {seconds:>7}{sees}  {step.note}"
        stage.say_styled(f"{step.call:9} {map_row(step.layout)} ", word, said)
        return
    stage.say(f"{step.call:9} {map_row(step.layout)}")
    stage.say_styled(f"{'':10}", word, f" {seconds:>7}{sees}")
    if step.note:
        stage.say(f"{'':10}{step.note}")


def _difference(step: Step) -> str:
    if step.late is False:
        return f"{step.call}: expected a late answer, got {step.verdict} in time"
    if step.verdict.name != step.expected:
        return f"{step.call}: expected {step.expected}, got {step.verdict}"
    return f"{step.call}: {len(step.layout.enabled)} vCPUs are plugged, the guest says it runs on {step.online}"
