"""The scripted agent: what goes wrong in it is the test's to know."""

import asyncio
from collections.abc import Iterable

import pytest

from qmpvcpu import GuestAgentError
from qmpvcpu.testing import ScriptedAgent
from tests.agent.conftest import Asking


async def test_what_an_answer_raises_is_raised_at_the_end(asking: Asking) -> None:
    def look() -> Iterable[int]:
        raise LookupError("no such VM")

    async def ask() -> None:
        async with ScriptedAgent(look=look) as agent:
            with pytest.raises(GuestAgentError):
                await asking(agent.path, within=0.3).cpus()

    with pytest.raises(LookupError, match="no such VM"):
        await ask()


async def test_it_reads_letters_that_come_in_two_pieces() -> None:
    async with ScriptedAgent() as agent:
        reader, writer = await asyncio.open_unix_connection(agent.path)
        message = '{"execute": "guest-ping", "id": "\u00e9"}'.encode()
        for piece in (message[:-3], message[-3:]):
            writer.write(piece)
            await asyncio.sleep(0.05)
        assert await reader.readline() == b'{"return": {}, "id": "\\u00e9"}\n'
        writer.close()
