"""Reading a VM once, without staying attached."""

from typing import Any

import qmpvcpu
from qmpvcpu.qmp.queries import look
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.peer import Command, ScriptedPeer
from tests.captures import all_captures
from tests.controller.test_scripted import capture_answers


async def test_a_look_sees_what_an_attachment_sees() -> None:
    async with MicroGuest(boot=(0, 2)) as guest:
        async with qmpvcpu.attach(guest.sockets[1]) as vm:
            attached = vm.layout
        seen = await look(guest.sockets[1])
    assert seen == attached


async def test_what_changes_between_two_replies_is_read_again() -> None:
    capture = next(each for each in all_captures() if each.arch == "x86_64")
    threads = next(each["return"] for each in capture.data["steps"] if each["execute"] == "query-cpus-fast")
    asked = 0

    async def answer(_: Command) -> Any:
        nonlocal asked
        asked += 1
        if asked > 1:
            return threads
        await peer.event("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu1/lapic"})
        return []

    answers = {**capture_answers(capture), "query-cpus-fast": answer}
    async with ScriptedPeer.from_capture(capture.data, answers=answers) as peer:
        seen = await look(peer.address)
    assert asked == 2
    assert None not in seen[0].slot.host_tids


async def test_the_target_is_asked_for_only_where_no_vcpu_tells_it() -> None:
    capture = next(each for each in all_captures() if each.arch == "x86_64")
    async with ScriptedPeer.from_capture(capture.data, answers=capture_answers(capture)) as peer:
        assert (await look(peer.address)).vm.arch == "x86_64"
        asked = [command.name for command in peer.received]
        peer.received.clear()
        peer.answers |= {"query-cpus-fast": [], "query-target": {"arch": "aarch64"}}
        assert (await look(peer.address)).vm.arch == "aarch64"
        assert "query-target" in [command.name for command in peer.received]
    assert "query-target" not in asked
