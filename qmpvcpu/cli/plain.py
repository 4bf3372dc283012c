"""The demo where the extra ``cli`` is not installed: the same story, in plain words and without options."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import qmpvcpu
from qmpvcpu.cli.answer import NO_ANSWER, NOT_SENT
from qmpvcpu.cli.demo_work import GuestKind, demo
from qmpvcpu.cli.streams import cannot_print, complain
from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.testing.qemu import QemuNotFoundError
from qmpvcpu.vm.controller import VcpuController


class _PlainStage:
    """A stage that prints words as they are."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []

    def attach(self, target: Path, *, name: str) -> AbstractAsyncContextManager[VcpuController]:
        return qmpvcpu.attach(target, name=name, resync_interval=None)

    def note(self, line: str) -> None:
        complain(line)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def say_styled(self, *parts: str | tuple[str, str]) -> None:
        self.say("".join(part if isinstance(part, str) else part[0] for part in parts))


def play() -> int:
    """Play the demo with the micro-guest and return the exit code."""
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())  # as for every command: the error says it better
    stage = _PlainStage()
    try:
        answer = asyncio.run(demo(stage, GuestKind.MICROGUEST, None))
        stage.say(str(answer.text))
    except QmpVcpuError as error:
        stage.note(f"qmpvcpu: {error}")
        return NOT_SENT if isinstance(error, QemuNotFoundError) else NO_ANSWER
    except OSError as error:
        return cannot_print(error)
    for line in answer.complaint:
        stage.note(line)
    stage.note("\nAll other commands: pip install 'qmpvcpu[cli]'")
    return answer.code
