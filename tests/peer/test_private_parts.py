"""qemu.qmp's private parts: what we gain by them where they are, and that all works where they are gone."""

import asyncio
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qemu.qmp import Message, QMPClient

from qmpvcpu.qmp.client import TunedClient
from qmpvcpu.testing.peer import ScriptedPeer
from tests.waiting import until

from .conftest import Heard, Open

ROOT = Path(__file__).parents[2]
METHODS = ["_get_exec_id", "_bh_send_message", "_recv", "_cb_inbound", "_cb_outbound"]  # we override them
ATTRIBUTES = ["_outgoing", "_writer", "_reader_task", "readbuflen"]  # we read them
EXPECTED = {
    "qemu": {"own": "0,4-6", "logged": "0,2", "given": "0,7"},
    "peer": {
        "rejection": "no",
        "a line": ["the peer sent a line of more than 10485760 bytes", 1, 9],
        "a hang-up": ["the peer hung up (end of file)", 1, 9],
    },
}
# What tests/peer says of these gains, which is not so without them.
GAINS = [
    "test_two_sessions_number_their_commands_apart",
    "test_commands_of_one_moment_go_out_in_one_piece_and_in_order",
    "test_its_owner_notices_nothing",  # with the owner's process, which only the writer tells
    "test_a_loss_is_explained_and_left_to_its_owner",
    "test_a_client_whose_inside_is_another_is_served_all_the_same",
    "test_what_the_monitor_peeks_at_is_where_it_was",
]


def without(names: list[str], directory: Path) -> dict[str, str]:
    """Make a copy of the installed qemu.qmp in which *names* are called otherwise; return the environment with it."""
    spec = importlib.util.find_spec("qemu.qmp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (installed,) = spec.submodule_search_locations
    copy = directory / "qemu" / "qmp"
    shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in copy.glob("*.py"):
        file.write_text(re.sub(rf"\b({'|'.join(names)})\b", r"\1_otherwise", file.read_text()))
    return os.environ | {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize("name", METHODS)
def test_the_installed_version_has_each_method_that_we_override(name: str) -> None:
    assert callable(getattr(QMPClient, name))
    assert getattr(TunedClient, name) is not getattr(QMPClient, name)


async def test_the_installed_version_has_each_attribute_that_we_read() -> None:
    async with ScriptedPeer() as peer:
        client = QMPClient()
        await client.connect(peer.path)
        assert [name for name in ATTRIBUTES if not hasattr(client, name)] in ([], ["readbuflen"])  # 0.0.5 and newer
        await client.disconnect()


async def test_our_ids_are_short_and_are_those_that_are_sent(connect: Open) -> None:
    async with ScriptedPeer(answers={"query-status": {}}) as peer:
        monitor = await connect(peer.address)
        await monitor.execute("query-status")
        assert re.fullmatch(r"\D{4}1", peer.received[-1].message["id"])


async def test_a_flood_of_events_leaves_others_their_turn(connect: Open, heard: Heard) -> None:
    event = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 0}}\r\n'
    async with ScriptedPeer() as peer:
        await connect(peer.address)
        sending = asyncio.create_task(peer.send(event * 20_000))
        most_in_a_row, before = 0, 0
        while before < 20_000:
            await asyncio.sleep(0)
            most_in_a_row = max(most_in_a_row, len(heard.events) - before)
            before = len(heard.events)
        await sending
        assert most_in_a_row <= 64


async def test_messages_are_rendered_only_for_a_log_that_is_read(
    connect: Open, heard: Heard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rendered = []
    plain = Message.__str__

    def counted(self: Message) -> str:
        rendered.append(self)
        return plain(self)

    monkeypatch.setattr(Message, "__str__", counted)
    async with ScriptedPeer(answers={"query-status": {}}) as peer:
        monitor = await connect(peer.address)
        await monitor.execute("query-status")
        await peer.event("STOP")
        await until(lambda: heard.events)
        assert rendered == []
        caplog.set_level(logging.DEBUG, logger="qemu.qmp")
        await monitor.execute("query-status")
    assert rendered
    texts = [record.getMessage()[:3] for record in caplog.records]
    assert [text for text in texts if text in ("-->", "<--")] == ["-->", "<--"]


@pytest.mark.qemu
@pytest.mark.parametrize("names", [*([name] for name in METHODS + ATTRIBUTES), METHODS + ATTRIBUTES], ids="+".join)
async def test_all_works_where_it_is_called_otherwise(names: list[str], tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.peer.exercise"),
        env=without(names, tmp_path),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    seen = json.loads(said)
    assert Path(seen.pop("file")).is_relative_to(tmp_path)
    assert seen == EXPECTED


def test_the_tests_of_the_monitor_pass_where_all_are_called_otherwise(tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--ignore={__file__}", "tests/peer"),
            *("-k", " and ".join(f"not {name}" for name in GAINS)),
        ],
        env=without(METHODS + ATTRIBUTES, tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
