"""Something between us and QEMU that loses the connection: at any message, before or after it is passed on."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tests.crash.points import Points

_DECODER = json.JSONDecoder()


class Proxy:
    """A UNIX socket that leads to another one, as long as it is not cut; a new connection is taken at once.

    Args:
        path: Where to listen.
        target: QEMU's QMP socket.

    Attributes:
        points: What crosses a point before and after each message is passed on; None: nobody.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.points: Points | None = None
        self._target = target
        self._names: dict[str, str] = {}
        self._ends: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        """End both connections, at once."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.append(writer)
        with contextlib.suppress(OSError):
            from_qemu, to_qemu = await asyncio.open_unix_connection(self._target)
            self._ends.append(to_qemu)
            self._names.clear()
            await asyncio.gather(self._pass_on(reader, to_qemu), self._pass_on(from_qemu, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unread = b""
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                *messages, (unread, _) = self._split(unread + data)
                for raw, name in messages:
                    self._cross(f"{name} on its way")
                    if writer.transport.is_closing():
                        return
                    writer.write(raw)
                    self._cross(f"{name} passed on")
        self.cut()  # one side's end is the other's

    def _split(self, data: bytes) -> Iterator[tuple[bytes, str]]:
        """Each message with its name, then what is not whole yet; QEMU's end in a line feed, ours do not."""
        text = data.decode()
        while text.lstrip():
            try:
                message, end = _DECODER.raw_decode(text.lstrip())
            except ValueError:
                break
            end += len(text) - len(text.lstrip())
            yield text[:end].lstrip().encode() + b"\r\n", self._name(message)
            text = text[end:]
        yield text.encode(), ""

    def _name(self, message: dict[str, Any]) -> str:
        if "event" in message:
            data = message.get("data", {})
            info = data.get("info", data)
            what = info.get("path") or f"{info.get('slot', '')} {info.get('source', '')}/{info.get('status', '')}"
            return f"{message['event']} {what}"
        if "execute" in message:
            called = (message["execute"], message.get("arguments", {}).get("id"))
            return self._names.setdefault(message.get("id", ""), " ".join(filter(None, called)))
        return f"reply to {self._names.get(message.get('id', ''), 'nothing')}"

    def _cross(self, name: str) -> None:
        if self.points is not None:
            self.points.cross(name)
