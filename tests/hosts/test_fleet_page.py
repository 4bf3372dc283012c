"""What docs/fleet.md shows of two hosts, as an operator types it."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpvcpu.testing.nats import free_ports
from tests.docs.blocks import Block, block
from tests.hosts.world import vm_in

pytestmark = pytest.mark.qemu

_DEADLINE_S = 60.0


class Reader:
    """Who types what the page shows, with addresses and directories of this test's own."""

    def __init__(self, tmp_path: Path) -> None:
        (self.port,) = free_ports(1)
        self.tmp_path = tmp_path
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("QMPVCPU_")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def typed(self, shown: Block, host: str) -> str:
        """What stands there, as it is typed on *host*."""
        text = shown.text.replace("10.0.0.1:4222", f"127.0.0.1:{self.port}")
        text = text.replace("nats-server -js", f"nats-server -a 127.0.0.1 -p {self.port} -js")
        text = re.sub(r"/(?:run|var/lib)/(\w+)", rf"{self.tmp_path}/{host}/\1", text)
        text = text.replace("qmpvcpu agent ", f"qmpvcpu agent --host {host} ")
        return re.sub("^pip install .*$", ":", text, flags=re.MULTILINE)

    async def run(self, shown: Block) -> str:
        """What a block prints."""
        script = "set -e\n" + self.typed(shown, "here")
        if "export" not in script:
            script = f"export QMPVCPU_NATS=nats://127.0.0.1:{self.port}\n{script}"
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", script, env=self.environment, stdout=-1, stderr=-1
        )
        async with asyncio.timeout(_DEADLINE_S):
            out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    @contextlib.asynccontextmanager
    async def running(self, shown: Block, host: str) -> AsyncIterator[None]:
        """A block whose last command goes on."""
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", self.typed(shown, host), env=self.environment, start_new_session=True
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            await process.wait()


async def listening(port: int) -> None:
    """Return once somebody listens at *port*."""
    async with asyncio.timeout(_DEADLINE_S):
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            await asyncio.sleep(0.05)


async def test_two_hosts_are_looked_at_and_changed_as_the_page_shows(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for each in ("here/nats", "rack1-a/vms", "rack1-b/vms"):
        (tmp_path / each).mkdir(parents=True)
    agent = block("docs/fleet.md", "an agent")
    async with (
        vm_in(tmp_path / "rack1-a" / "vms", "web-1"),
        vm_in(tmp_path / "rack1-b" / "vms", "web-2"),
        reader.running(block("docs/fleet.md", "the server"), "here"),
    ):
        await listening(reader.port)
        async with reader.running(agent, "rack1-a"), reader.running(agent, "rack1-b"):
            async with asyncio.timeout(_DEADLINE_S):
                shown = ""
                while not re.search("2 of 2 VMs read", shown):
                    with contextlib.suppress(AssertionError):  # no agent has told of any VM yet
                        shown = await reader.run(block("docs/fleet.md", "looking"))
            assert "rack1-a/web-1" in shown
            assert "rack1-b/web-2" in shown
            changed = await reader.run(block("docs/fleet.md", "changing"))
            assert "2 of 2 VMs reached" in changed
            assert changed.count("0-3") > 2
