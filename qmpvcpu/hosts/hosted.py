"""One VM of a host, as its agent knows it."""

import asyncio
from dataclasses import replace
from typing import Any, Protocol

from qmpvcpu.errors import MonitorConnectError
from qmpvcpu.fleet import VmResult
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Answer
from qmpvcpu.vm.controller import VcpuController


class Tell(Protocol):
    """What is called when there is something new to tell of a VM."""

    def __call__(self, vm: str, *, urgent: bool) -> None:
        """Take note of it; *urgent*: somebody waits for it."""


class HostedVm:
    """One VM, by its name: it stays the same object while its QEMU comes and goes.

    Args:
        key: Which it is.
        tell: Called when there is something new to tell of it.

    Attributes:
        key: As given.
        address: Where its QMP is; "": nowhere.
        vm: The VM while it is attached.
        error: Why it is not attached, or cannot be served.
        answer: How far the wish got that was answered last, or None.
        target: The vCPUs of the wish that was reached last, if it still stands; else None.
        deleted: The revision of the last deletion of a wish that was taken note of; 0: there was none.
        turn: Held by who changes the whole map: one wish or request at a time.
        moved: Set whenever it was attached, or lost.
    """

    def __init__(self, key: VmKey, tell: Tell) -> None:
        self.key = key
        self._nowhere = MonitorConnectError(str(key), "no VM of this name is on this host now")
        self.address = ""
        self.vm: VcpuController | None = None
        self.error: BaseException | None = self._nowhere
        self.answer: Answer | None = None
        self.target: VcpuMap | None = None
        self.deleted = 0
        self.turn = asyncio.Lock()
        self.moved = asyncio.Event()
        self._tell = tell
        self._outcome: VmResult[TransitionReport | None] | None = None  # of the answer

    @property
    def is_here(self) -> bool:
        """True if it is attached."""
        return self.vm is not None

    def found(self, address: str, vm: VcpuController | None, error: BaseException | None) -> None:
        """Note where it is, and whether it could be attached."""
        if not address:
            error = self._nowhere
        if (address, vm, error) == (self.address, self.vm, self.error):
            return
        self.address, self.vm, self.error = address, vm, error
        self.moved.set()
        self._tell(self.key.vm, urgent=False)

    def take_deletion(self, revision: int) -> None:
        """Note that what was wished was deleted: who still waits for its answer gets none."""
        self.deleted = max(self.deleted, revision)
        self._tell(self.key.vm, urgent=True)

    def changed(self) -> None:
        """Note that its layout has changed."""
        self._tell(self.key.vm, urgent=False)

    def take_answer(self, answer: Answer, outcome: VmResult[TransitionReport | None] | None = None) -> None:
        """Note how far a wish got, and what came of it."""
        self.answer, self._outcome = answer, outcome
        self._tell(self.key.vm, urgent=True)

    def recall(self, document: dict[str, Any]) -> None:
        """Take over what an earlier agent has told of its wish; what cannot be read of it is left out."""
        try:
            self.answer = from_json(Answer, document["answer"])
            self._outcome = VmResult.from_json(document.get("came_to", document))
            wanted = document["wanted"]
            self.target = None if wanted is None else VcpuMap.parse(wanted)
        except (KeyError, TypeError, ValueError):
            return

    @property
    def has_drifted(self) -> bool:
        """True if somebody has changed by hand what was wished and reached."""
        if self.target is None or self.vm is None or self.turn.locked():
            return False
        return self.vm.layout.enabled != self.target

    def result(self) -> VmResult[Any]:
        """Return what is known of it now, as a result without a value."""
        layout = None if self.vm is None else self.vm.layout
        return VmResult(self.address, self.key.vm, layout, None, self.error, 0.0)

    def document(self, now: float) -> dict[str, Any]:
        """Return its state, as the bucket of states has it; *now* is the server's time."""
        known, came_to = self.result(), self._outcome
        if came_to is not None:
            came_to = replace(came_to, address=self.address, name=self.key.vm, layout=known.layout)
            if self.error is None:
                known, came_to = came_to, None
        return {
            **known.to_json(whole=True),
            # What came of the wish, where the rest says why the VM is not there now.
            **({} if came_to is None else {"came_to": came_to.to_json(whole=True)}),
            "host": self.key.host,
            "time": round(now, 3),
            "answer": None if self.answer is None else to_json(self.answer),
            "wanted": None if self.target is None else str(self.target),
            "drift": self.has_drifted,
            "deleted": self.deleted,
        }
