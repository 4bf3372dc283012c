"""What a scripted QMP peer receives, and what it can answer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol


class _Connection(Protocol):
    """The connection that a command came on."""

    async def send(self, message: Mapping[str, Any] | bytes) -> None: ...

    async def hang_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Line:
    """What one side said to the other.

    Attributes:
        at: When, in seconds since the epoch.
        sender: Who; the scripted peer plays QEMU.
        text: What, as it was on the wire but for bytes that are no UTF-8.
    """

    at: float
    sender: Literal["client", "qemu"]
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer: QMP's error reply.

    Attributes:
        desc: QEMU's text.
        error_class: QEMU's error class.
    """

    desc: str
    error_class: str = "GenericError"


@dataclass(frozen=True, slots=True)
class Hang:
    """An answer: none, ever."""


HANG: Final = Hang()


@dataclass(frozen=True, slots=True)
class Command:
    """One command that the peer received, and the ways to answer it.

    Attributes:
        name: The QMP command.
        arguments: Its arguments, {} if it had none.
        message: All of the message.
    """

    name: str
    arguments: Mapping[str, Any]
    message: Mapping[str, Any]
    _peer: _Connection = field(repr=False)

    def _reply(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a reply message, with this command's id if it had one."""
        return {**content, **({"id": self.message["id"]} if "id" in self.message else {})}

    async def reply(self, value: Any) -> None:
        """Answer with a ``return``; may be called again, to answer twice."""
        await self._peer.send(self._reply({"return": value}))

    async def fail(self, desc: str, error_class: str = "GenericError") -> None:
        """Answer with an ``error``."""
        await self._peer.send(self._reply({"error": {"class": error_class, "desc": desc}}))

    async def answer(self, content: Mapping[str, Any]) -> None:
        """Answer with any message, such as one with neither ``return`` nor ``error``; the id is added."""
        await self._peer.send(self._reply(content))

    async def cut(self, value: Any) -> None:
        """Send the first half of a reply, and hang up."""
        data = json.dumps(self._reply({"return": value})).encode()
        await self._peer.send(data[: len(data) // 2])
        await self._peer.hang_up()


# What stands in ScriptedPeer.answers: a value to return, a Failure, HANG, or a function of the command that returns
# one of these, itself or awaited. A function may send events first, with the peer that it closes over.
Answer = Any
