"""Whatever an agent says, and whenever: an answer or an error of ours within the deadline, and no fault elsewhere."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu import GuestAgentError
from qmpvcpu.agent.door import GuestAgent
from qmpvcpu.testing.directory import vm_directory

DEADLINE = 0.2
Answer = Callable[[dict[str, Any]], bytes]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def honest(question: dict[str, Any]) -> bytes:
    """What an agent answers."""
    command, arguments = question["execute"], question.get("arguments", {})
    answers = {
        "guest-sync-delimited": arguments.get("id"),
        "guest-get-vcpus": [{"logical-id": 0, "online": True, "can-offline": False}],
        "guest-set-vcpus": len(arguments.get("vcpus", ())),
        "guest-get-osinfo": {"id": "debian"},
        "guest-file-open": 1000,
        "guest-file-read": {"count": 3, "buf-b64": "YWJj", "eof": True},
    }
    return line({"return": answers.get(command, {}), "id": question["id"]})


def line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def saying(data: bytes) -> Answer:
    return lambda _: data


def returning(value: Any) -> Answer:
    return lambda question: line({"return": value, "id": question["id"]})


def failing(value: Any) -> Answer:
    return lambda question: line({"error": value, "id": question["id"]})


def halving(question: dict[str, Any]) -> bytes:
    return honest(question)[:9]


ANSWERS = st.one_of(
    st.just(honest),
    st.just(honest),
    st.just(halving),
    st.binary(max_size=40).map(saying),
    JSON.map(line).map(saying),
    st.dictionaries(st.sampled_from(["return", "error", "id", "event", "QMP"]), JSON).map(line).map(saying),
    JSON.map(returning),
    JSON.map(failing),
    st.fixed_dictionaries({"class": st.text(max_size=20), "desc": st.text(max_size=40)}).map(failing),
)


class Fuzzed:
    """An agent that gives each question the next of its answers, and then none; None hangs up."""

    def __init__(self, script: list[list[Answer] | None]) -> None:
        self._script = iter(script)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder, text = json.JSONDecoder(), ""
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                text += data.replace(b"\xff", b"").decode()
                while text:
                    question, used = decoder.raw_decode(text)
                    text = text[used:]
                    answers = next(self._script, [])
                    if answers is None:
                        writer.close()
                        return
                    for answer in answers:
                        writer.write(answer(question))
        writer.close()


async def ask_all(path: str) -> None:
    door = GuestAgent(path, timeout=DEADLINE)
    for ask in (door.cpus, door.os, door.commands, lambda: door.read_file("/x"), lambda: door.set_cpus({1: True})):
        async with asyncio.timeout(DEADLINE + 20):  # of a busy machine
            with contextlib.suppress(GuestAgentError):
                await ask()
    await door.close()


@settings(max_examples=40)
@given(st.lists(st.none() | st.lists(ANSWERS, max_size=3), max_size=12))
def test_no_agent_hurts_whoever_asks(script: list[list[Answer] | None]) -> None:
    async def run() -> None:
        faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        with vm_directory() as folder:
            server = await asyncio.start_unix_server(Fuzzed(script).serve, f"{folder}/ga")
            try:
                await ask_all(f"{folder}/ga")
            finally:
                server.close()
            await asyncio.sleep(0)
        assert faults == []

    asyncio.run(run())
