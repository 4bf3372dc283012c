"""A QMPClient for the guest agent's dialect of QMP: no greeting, strays of earlier clients, 0xFF as a delimiter."""

import asyncio
from typing import Final

from qemu.qmp import Message
from qemu.qmp.error import ProtocolError

from qmpvcpu.qmp.client import TunedClient

SYNC: Final = "guest-sync-delimited"
_DELIMITER: Final = b"\xff"  # is in no UTF-8 text
_MOST_STRAYS: Final = 256  # messages that answer nothing, in a row; an earlier client left a few
_STRAY_SHIFT: Final = 15  # so many bytes, 32 KiB, count as one more
LONGEST_LINE: Final = 4 << 20  # bytes, from qemu.qmp 0.0.5 on; the list of 16,384 CPUs has a quarter of that


class GreetedError(ProtocolError):
    """The peer greeted, so it is a QMP server and no agent."""


class NoIdsError(ProtocolError):
    """The agent answers without the question's id: it is older than that."""


class TooManyStraysError(ProtocolError):
    """What comes answers nothing, again and again."""


class _Flushing(Message):
    """A message that makes the agent drop what it has of a half one.

    Source: QEMU qga/qapi-schema.json, ``guest-sync-delimited``: precede it with 0xFF.
    """

    def __bytes__(self) -> bytes:
        return _DELIMITER + super().__bytes__()


class AgentClient(TunedClient):
    """A client that passes over what is not for it.

    What an earlier client, or an earlier question, left behind reaches the next client: answers, halves of them, and
    errors without an id (such as the one about 0xFF). None of that ends the session, until it is too much.

    Attributes:
        token: The number that the agent was asked to return last, to be told from strays; None: none was.
        without_id: A value that it returned in this exchange without an id, in an object; None: none.
        synchronised: True once the agent has returned it: from then on a line that cannot be read ends the session.
    """

    def __init__(self) -> None:
        super().__init__()
        self.await_greeting = False
        self.token: int | None = None
        self.without_id: dict[str, object] | None = None
        self.synchronised = False
        self.readbuflen = LONGEST_LINE
        self._strays = 0

    def begin(self) -> None:
        """Begin an exchange: what was passed over before does not count."""
        self._strays = 0
        self.without_id = None

    async def _do_recv(self) -> Message:
        while True:
            line = await self._readline()
            line = line[line.rfind(_DELIMITER) + 1 :]
            self._strays += len(line) >> _STRAY_SHIFT
            try:
                return Message(line, eager=True)
            except (ProtocolError, ValueError, RecursionError):
                if self.synchronised:
                    raise
                await self._pass_over()

    async def _pass_over(self) -> None:
        self._strays += 1
        if self._strays > _MOST_STRAYS:
            raise TooManyStraysError(f"it sent {self._strays} messages that answer nothing")
        await asyncio.sleep(0)  # so that a flood does not keep other tasks waiting

    async def _on_message(self, msg: Message) -> None:
        if "QMP" in msg and not self.synchronised:
            raise GreetedError("it greets as QMP does")
        if isinstance(msg.get("id"), str) and "event" not in msg:
            await self._pass_over()  # counted, in case it is a stray; an exchange has two answers
            await super()._on_message(msg)
        elif "id" not in msg and self.token is not None and msg.get("return") == self.token:
            raise NoIdsError("its answers do not carry the id of the question")
        else:
            if self.synchronised and "id" not in msg and "return" in msg:
                self.without_id = dict(msg)
            await self._pass_over()

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(_Flushing(dict(msg)) if msg.get("execute") == SYNC else msg)
