"""Two agents under one name, as an operator starts them."""

from pathlib import Path

from qmpvcpu.testing.nats import NatsServer
from tests.cli.running import run, running


async def test_a_second_agent_of_a_name_is_told_to_take_another(tmp_path: Path) -> None:
    async with NatsServer() as server:
        assert (await run("hosts", "init", "--lease", "3", "--nats", server.url)).code == 0
        words = ("agent", "--nats", server.url, "--host", "web1", "--dir", tmp_path, "--read-only")
        async with running(*words) as first:
            while "web1" not in (await run("hosts", "list", "--nats", server.url)).out:
                assert first.process.returncode is None
            second = await run(*words)
    assert second.code == 2
    assert "another agent has the name web1: give this one another, --host NAME" in second.err
    assert "{" not in second.err
