"""What a peer may send is bounded where it is read: one reply neither freezes the process nor raises a stranger."""

import json
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import MalformedReplyError, MonitorConnectError, MonitorLostError, QmpVcpuError
from qmpvcpu.testing.peer import GREETING, HANG, Command, Failure, ScriptedPeer
from tests.captures import all_captures
from tests.controller.test_scripted import capture_answers, recorded

NAME = "10.0.2-q35-sct-2x2x2-boot3"
CAPTURE = next(capture for capture in all_captures() if capture.name == NAME)
SLOTS: list[dict[str, Any]] = CAPTURE.replies("query-hotpluggable-cpus")[0]
THREADS: list[dict[str, Any]] = CAPTURE.replies("query-cpus-fast")[0]


def versioned(**numbers: Any) -> bytes:
    greeting = json.loads(json.dumps(GREETING))
    greeting["QMP"]["version"]["qemu"] |= numbers
    return json.dumps(greeting).encode() + b"\r\n"


@pytest.mark.parametrize(
    ("command", "reply", "key"),
    [
        ("query-hotpluggable-cpus", [{**SLOTS[0], "vcpus-count": 10**9}, *SLOTS[1:]], "vcpus-count"),
        ("query-hotpluggable-cpus", [{**SLOTS[0], "vcpus-count": 10**18}, *SLOTS[1:]], "vcpus-count"),
        ("query-hotpluggable-cpus", [{**SLOTS[0], "type": "\ud800"}, *SLOTS[1:]], "type"),
        ("query-cpus-fast", [{**THREADS[0], "thread-id": 10**30}, *THREADS[1:]], "thread-id"),
        ("query-cpus-fast", [{**THREADS[0], "cpu-index": 0.5}, *THREADS[1:]], "cpu-index"),
        (
            "query-acpi-ospm-status",
            [{"slot": "9" * 5000, "slot-type": "CPU", "source": 3, "status": 0}],
            "slot",
        ),
        ("query-name", {"name": "\ud800"}, "name"),
        ("query-uuid", {"UUID": "../../etc"}, "UUID"),
        ("query-memory-size-summary", {"base-memory": 10**30}, "base-memory"),
        ("query-migrate", {"status": ["active"]}, "status"),
    ],
)
async def test_a_value_out_of_bounds_is_a_malformed_reply_that_names_its_key(
    command: str, reply: Any, key: str
) -> None:
    with pytest.raises(MalformedReplyError, match=f"malformed reply to {command}: '{key}'") as caught:
        async with recorded(NAME, {command: reply}):
            pass
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize(
    "greeting",
    [
        versioned(major=float("inf")),
        versioned(major=-1),
        versioned(minor=10**30),
        versioned(micro=True),
        versioned(micro="0"),
        b'{"QMP": {"version": {"qemu": {"major": 1' + b"0" * 5000 + b"}}}}\r\n",
        b'{"return": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\r\n" + versioned(),
        b'{"return": ' + b"7" * 5000 + b"}\r\n" + versioned(),
        b'{"QMP": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_000 + b"}\r\n",
        b'{"QMP": {"version": {"qemu": "\\ud800"}, "capabilities": []}}\r\n',
    ],
    ids=range(10),
)
async def test_a_greeting_that_no_qemu_sends_is_no_session(greeting: bytes) -> None:
    async with ScriptedPeer(greeting=greeting) as peer:
        with pytest.raises(MonitorConnectError) as caught:
            await qmpvcpu.attach(peer.address, reply_timeout=5)
    str(caught.value).encode()


async def test_a_reply_nested_too_deeply_ends_the_session_with_its_reason() -> None:
    async with recorded(NAME) as (peer, vm):

        async def nested(_: Command) -> Any:
            await peer.send(b'{"return": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\r\n")
            return HANG

        peer.answers["query-cpus-fast"] = nested
        with pytest.raises(MonitorLostError, match="wrong shape: RecursionError"):
            await vm.refresh()


async def test_what_a_peer_says_in_an_error_is_cut_and_can_be_encoded() -> None:
    async with recorded(NAME, {"device_add": Failure("\ud800" + "x" * 100_000, "C" * 5000)}) as (_, vm):
        with pytest.raises(qmpvcpu.CommandRejectedError, match=r"\\ud800xxx") as caught:
            await vm.plug(3)
    assert len(str(caught.value)) < 5000
    str(caught.value).encode()


async def test_a_name_that_cannot_be_encoded_is_an_error_of_ours_or_does_no_harm(tmp_path: Path) -> None:
    given = {**capture_answers(CAPTURE), "query-name": {}}
    async with ScriptedPeer.from_capture(CAPTURE.data, answers=given) as peer:
        with pytest.raises(MonitorConnectError, match="cannot be encoded"):
            await qmpvcpu.attach(f"{peer.path}\ud800")
        with pytest.raises(MonitorConnectError, match="cannot be resolved"):
            await qmpvcpu.attach(("\ud800", 4444))
        with pytest.raises(QmpVcpuError):
            await qmpvcpu.attach(peer.address, name="\ud800", record=tmp_path / "vm.xml")
        async with qmpvcpu.attach(peer.address, name="\ud800") as vm:
            assert vm.layout.vm.name == "\ud800"
