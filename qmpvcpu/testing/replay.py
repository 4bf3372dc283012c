"""A recorded QEMU as answers for a scripted QMP peer."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from qmpvcpu.testing.dialogue import Answer, Command, Failure

_QUERIES: Final = ("query-", "qom-get", "qom-list", "device-list-properties")


class Replay:
    """The steps of a recording, and how far they have been replayed."""

    def __init__(self, steps: Iterable[Mapping[str, Any]]) -> None:
        self._steps = tuple(steps)
        self._at = 0

    def answers(self) -> dict[str, Answer]:
        """Return an answer for each command that the recording has."""
        names = {step["execute"] for step in self._steps}
        return {name: self._query if name.startswith(_QUERIES) else self._change for name in sorted(names)}

    def _query(self, command: Command) -> Answer:
        """Answer from here up to the next change, else from before."""
        for step in self._steps[self._at :]:
            if not step["execute"].startswith(_QUERIES):
                break
            if self._is(step, command):
                return self._outcome(step)
        for step in reversed(self._steps[: self._at]):
            if self._is(step, command):
                return self._outcome(step)
        return Failure(f"the recording has no {command.name} with {dict(command.arguments)} up to here")

    def _change(self, command: Command) -> Answer:
        """Answer as recorded, and move to what follows."""
        for number, step in enumerate(self._steps[self._at :], start=self._at + 1):
            if self._is(step, command):
                self._at = number
                return self._outcome(step)
        return Failure(f"the recording has no {command.name} with {dict(command.arguments)} from here")

    @staticmethod
    def _is(step: Mapping[str, Any], command: Command) -> bool:
        """Tell whether a step is this command."""
        return step["execute"] == command.name and (step.get("arguments") or {}) == dict(command.arguments)

    @staticmethod
    def _outcome(step: Mapping[str, Any]) -> Answer:
        """Return a step's answer."""
        if "error" in step:
            return Failure(step["error"]["desc"], step["error"]["class"])
        return step["return"]
