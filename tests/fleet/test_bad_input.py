"""One VM's trouble is its own: each has its own error, and the others come in the time that they take alone."""

import asyncio
import contextlib
import os
import re
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from qmpvcpu.errors import (
    InvalidMapError,
    MonitorConnectError,
    MonitorLostError,
    MonitorTimeoutError,
    SameVmError,
    SocketDirectoryError,
)
from qmpvcpu.fleet import Fleet, Rescan
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import HANG, ScriptedPeer
from tests.fleet.vms import dead_socket, garbage, guests, held, stopped

pytestmark = pytest.mark.qemu

TIMEOUT = 3.0


@pytest.fixture
async def vms() -> AsyncIterator[list[MicroGuest]]:
    async with guests(5) as started:
        yield started


@pytest.mark.parametrize("concurrency", [1, 16])
async def test_a_stopped_a_dead_a_held_and_a_babbling_one_leave_the_others_alone(
    vms: list[MicroGuest], tmp_path: Path, concurrency: int
) -> None:
    dead = dead_socket(tmp_path / "dead")
    halted, taken, *good = vms
    loop = asyncio.get_running_loop()
    with stopped(halted):
        async with held(taken), garbage() as babbling:
            bad = [str(halted.qmp), str(taken.qmp), str(dead), babbling.path]
            async with Fleet(
                [*bad, *(each.qmp for each in good)], reply_timeout=TIMEOUT, concurrency=concurrency
            ) as fleet:
                came = [(result, loop.time()) async for result in fleet.set_map("0-1")]
    errors = {result.address.removeprefix("unix:"): result.error for result, _ in came if result.error}
    assert set(errors) == set(bad)
    assert all(isinstance(error, MonitorConnectError) for error in errors.values())
    for path, words in zip(
        bad, ("is stopped", "another client holds the socket", "left behind", "220 mail"), strict=True
    ):
        assert words in str(errors[path]), path
    for result, _ in came:
        if result.error is None:
            assert result.report is not None
            assert result.layout is not None
            assert result.layout.enabled == {0, 1}
    silent = [(result, at) for result, at in came if "no greeting" in str(result.error)]
    assert came[-2:] == silent  # nobody else waits for them
    assert all(result.seconds > TIMEOUT - 0.1 for result, _ in silent)
    assert silent[1][1] - silent[1][0].seconds < silent[0][1]  # beside each other, not one after the other


async def test_a_hundred_silent_ones_do_not_hold_up_the_last_in_line(vms: list[MicroGuest]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(ScriptedPeer(greeting=None)) for _ in range(100)]
        fleet = await stack.enter_async_context(
            Fleet([*(each.path for each in silent), vms[0].qmp], reply_timeout=60)
        )
        async with asyncio.timeout(30), contextlib.aclosing(fleet.attach()) as results:
            first = await anext(results)
    assert first.address == f"unix:{vms[0].qmp}"
    assert first.error is None


async def test_one_that_falls_silent_later_has_its_own_deadline(vms: list[MicroGuest]) -> None:
    async with Fleet([each.qmp for each in vms], reply_timeout=2) as fleet:
        assert [each.error for each in await fleet.attach()] == [None] * 5
        with stopped(vms[0]):
            first, *others = await fleet.refresh()
        assert isinstance(first.error, MonitorTimeoutError)
        assert first.layout is not None
        assert first.name == f"{vms[0].qmp.parent.name}/qmp0"
        assert [each.error for each in others] == [None] * 4
        assert max(each.seconds for each in others) < first.seconds
        assert (await fleet.refresh())[0].error is None


async def test_one_that_answers_no_command_is_given_up_at_the_deadline(vms: list[MicroGuest]) -> None:
    answers = {"query-status": HANG}
    async with (
        ScriptedPeer(answers=answers, reject_others=True) as mute,
        Fleet([mute.path, vms[0].qmp], reply_timeout=2) as fleet,
    ):
        silent, good = await fleet.attach()
    assert isinstance(silent.error, MonitorTimeoutError)
    assert silent.layout is None
    assert good.error is None


async def test_a_vm_that_dies_is_lost_and_found_again_under_its_address(tmp_path: Path) -> None:
    path = tmp_path / "vm.qmp"
    async with guests(2) as (one, two):
        path.symlink_to(one.qmp)
        async with Fleet([path]) as fleet:
            assert (await fleet.attach())[0].error is None
            one.process.kill()
            await one.process.wait()
            (lost,) = await fleet.each(lambda vm: vm.wait_for(lambda _: False))
            assert isinstance(lost.error, MonitorConnectError | MonitorLostError)
            path.unlink()
            path.symlink_to(two.qmp)
            (found,) = await fleet.set_map("0,3")
            assert found.error is None
            assert found.layout is not None
            assert found.layout.enabled == {0, 3}


async def test_a_guest_that_refuses_has_its_report_and_undoes_nothing_of_the_others() -> None:
    async with guests(3, boot=2) as vms:
        await vms[1].set_behaviour(Behaviour.refusing(0x82))
        async with Fleet([each.qmp for each in vms]) as fleet:
            results = await fleet.set_map("0")
    assert [each.error is None for each in results] == [True, False, True]
    report = results[1].report
    assert report is not None
    assert report.steps[0].reason.startswith("the guest refused")
    assert [str(each.layout and each.layout.enabled) for each in results] == ["0", "0-1", "0"]


async def test_what_is_denied_is_denied_vm_by_vm_with_its_verdict(vms: list[MicroGuest]) -> None:
    async with Fleet([each.qmp for each in vms[:2]]) as fleet:
        results = await fleet.each(lambda vm: vm.plug(99))
    assert [each.verdict and each.verdict.name for each in results] == ["DENIED"] * 2


@pytest.mark.parametrize("wish", ["", "abc", [], "4-2"])
async def test_a_map_that_is_none_is_refused_before_anybody_is_asked(wish: str) -> None:
    async with ScriptedPeer() as peer:
        async with Fleet([peer.path]) as fleet:
            with pytest.raises(InvalidMapError):
                fleet.set_map(wish)
        assert peer.received == []


async def test_one_socket_by_two_paths_is_worked_on_once(vms: list[MicroGuest], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(vms[0].qmp)
    hard = vms[1].qmp.with_name("hard")
    hard.hardlink_to(vms[1].qmp)
    paths = [vms[0].qmp, link, vms[1].qmp, hard, vms[2].qmp, vms[2].qmp]
    async with Fleet(paths, reply_timeout=30) as fleet:
        assert len(fleet.addresses) == 5  # word for word the same is the same
        for _ in range(2):
            results = await fleet.refresh()
            assert [type(each.error) for each in results] == [
                type(None),
                SameVmError,
                type(None),
                SameVmError,
                type(None),
            ]
            assert isinstance(results[1].error, SameVmError)
            assert results[1].error.other == f"unix:{vms[0].qmp}"
            assert max(each.seconds for each in results) < 30


async def test_two_sockets_of_one_qemu_are_one_vm(vms: list[MicroGuest]) -> None:
    async with Fleet([*vms[0].sockets, vms[1].qmp]) as fleet:
        results = await fleet.set_map("0-1")
        errors = [each.error for each in results]
    assert [type(each) for each in errors].count(SameVmError) == 1
    assert errors.count(None) == 2
    assert "another QMP socket of the VM" in next(str(each) for each in errors if each is not None)


async def test_a_directory_has_a_vm_once_however_many_sockets_lead_to_it(
    vms: list[MicroGuest], tmp_path: Path
) -> None:
    for number, path in enumerate((*vms[0].sockets[:2], vms[1].qmp)):
        (tmp_path / f"{number}.qmp").symlink_to(path)
    async with Fleet(directory=tmp_path) as fleet:
        for _ in range(2):
            results = await fleet.set_map("0-1")
            assert [each.error for each in results] == [None, None]
            assert [each.address for each in results] == list(fleet.addresses)
        assert await fleet.rescan() == Rescan((), ())
        # Once the way that was taken is gone, the other one is.
        taken = next(each for each in fleet.vms if not each.endswith("2.qmp"))
        await fleet.vms[taken].close()
        Path(taken.removeprefix("unix:")).unlink()
        assert (await fleet.rescan()).went == (taken,)
        assert [each.error for each in await fleet.refresh()] == [None, None]
        assert taken not in fleet.addresses


async def test_one_qemu_by_two_tcp_addresses_is_known_by_its_uuid() -> None:
    tcp = ("-qmp", "tcp:127.0.0.1:0,server=on,wait=off")
    async with MicroGuest(extra_args=(*tcp, *tcp, "-uuid", str(uuid.uuid4()))) as guest:
        client = QMPClient()
        await client.connect(str(guest.sockets[1]))
        devices: Any = await client.execute("query-chardev")
        await client.disconnect()
        found = [re.search(r"tcp:[^,]+", device["filename"]) for device in devices]
        addresses = [each[0] for each in found if each is not None]
        assert len(addresses) == 2
        async with Fleet(addresses) as fleet:
            by_tcp = [type(each.error) for each in await fleet.attach()]
        async with Fleet([guest.qmp, addresses[0]]) as fleet:
            mixed = [each.error for each in await fleet.attach()]
    assert sorted(by_tcp, key=str) == sorted([SameVmError, type(None)], key=str)
    assert [type(each) for each in mixed].count(SameVmError) == 1


async def test_an_address_that_is_a_file_or_malformed_or_missing_has_its_own_error(
    vms: list[MicroGuest], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no socket")
    bad: list[Any] = [
        tmp_path / "file",
        tmp_path,
        tmp_path / "missing",
        "tcp:nowhere",
        "/" + "x" * 200,
        ("127.0.0.1", 1),
    ]
    async with Fleet([*bad, vms[0].qmp]) as fleet:
        results = await fleet.attach()
    words = ["regular file", "directory", "no such path", "tcp:HOST:PORT", "can have 107", "connection refused"]
    for result, word in zip(results, words, strict=False):
        assert word in str(result.error)
    assert results[-1].error is None


def folder_of(vm: MicroGuest) -> Path:
    """A directory on the file system that has the sockets, so that links to them can be hard."""
    folder = vm.qmp.with_name("vms")
    folder.mkdir()
    return folder


async def test_a_directory_gives_each_of_its_sockets_once_and_nothing_else(vms: list[MicroGuest]) -> None:
    folder = folder_of(vms[0])
    (folder / "log").write_text("no socket")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "a-link").symlink_to(folder / "vm1")
    (folder / "sub").mkdir()
    os.link(vms[0].qmp, folder / "vm1")
    os.link(vms[1].qmp, folder / "sub" / "qmp.sock")
    async with Fleet(directory=folder) as fleet:
        assert fleet.addresses == (f"unix:{folder}/vm1",)
    async with Fleet([folder / "vm1"], directory=folder, pattern="**/*") as fleet:
        assert fleet.addresses == (f"unix:{folder}/vm1", f"unix:{folder}/sub/qmp.sock")
        assert [each.error for each in await fleet.attach()] == [None, None]
    async with Fleet(directory=folder, pattern="*.qmp") as fleet:
        assert fleet.addresses == ()
        assert await fleet.attach() == ()


async def test_a_directory_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, word in ((tmp_path / "none", "No such file"), (tmp_path / "file", "Not a directory")):
        with pytest.raises(SocketDirectoryError, match=word) as caught:
            async with Fleet(directory=path):
                pass
        assert caught.value.path == str(path)


def test_what_can_be_meant_by_nobody_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="addresses are many"):
        Fleet("/run/vm.qmp")
    with pytest.raises(TypeError, match="not as int"):
        Fleet([7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="concurrency"):
        Fleet(concurrency=0)


@pytest.mark.parametrize("given", ["30", True, float("nan"), float("inf"), -1])
async def test_a_fleet_refuses_a_duration_that_cannot_be_meant_and_asks_nobody(given: Any) -> None:
    said = r"is a (finite )?number of seconds"
    async with ScriptedPeer() as peer:
        for name in ("reply_timeout", "resync_interval"):
            with pytest.raises((TypeError, ValueError), match=f"{name} {said}"):
                Fleet([peer.path], **{name: given})
        async with Fleet([peer.path]) as fleet:
            for name in ("timeout", "total_timeout", "revert_timeout"):
                with pytest.raises((TypeError, ValueError), match=f"{name} {said}"):
                    fleet.set_map("0", **{name: given})
                with pytest.raises((TypeError, ValueError), match=f"{name} {said}"):
                    fleet.set_count(1, **{name: given})
        assert list(peer.transcript) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"in_flight": 0}, "in_flight is at least 1, not 0"),
        ({"in_flight": "8"}, "in_flight is a whole number"),
        ({"on_failure": "revert"}, "on_failure is one of OnFailure.STOP"),
        ({"allow_fatal": "no"}, "allow_fatal is True or False"),
        ({"reply_timeout": 3}, "there is no option reply_timeout"),
    ],
)
async def test_a_fleet_refuses_terms_that_cannot_be_meant_and_asks_nobody(options: dict[str, Any], said: str) -> None:
    async with ScriptedPeer() as peer, Fleet([peer.path]) as fleet:
        with pytest.raises((TypeError, ValueError), match=said):
            fleet.set_map("0", **options)
        with pytest.raises((TypeError, ValueError), match=said):
            fleet.set_count(1, **options)
        for count in ("1", True, 1.0):
            with pytest.raises(TypeError, match="count is a whole number"):
                fleet.set_count(count)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="vCPU ids are given as a collection"):
            fleet.set_map(3)  # type: ignore[arg-type]
        assert list(peer.transcript) == []
    for pattern in ("", "/run/*.qmp"):
        with pytest.raises(ValueError, match="pattern"):
            Fleet(directory="/run", pattern=pattern)


async def test_vms_come_and_go_as_the_directory_is_looked_into_again(vms: list[MicroGuest]) -> None:
    folder = folder_of(vms[3])
    async with Fleet(directory=folder) as fleet:
        assert await fleet.attach() == ()
        for number in range(2):
            os.link(vms[number].qmp, folder / f"vm{number}")
        came, went = await fleet.rescan()
        assert came == (f"unix:{folder}/vm0", f"unix:{folder}/vm1")
        assert went == ()
        assert [each.error for each in await fleet.attach()] == [None, None]
        # A socket that is gone says nothing of a VM that answers.
        (folder / "vm0").unlink()
        assert await fleet.rescan() == ((), ())
        assert (await fleet.refresh())[0].error is None
        # A VM that has ended while its socket is there is told of, not dropped.
        vms[1].process.kill()
        await vms[1].process.wait()
        with contextlib.suppress(MonitorLostError):
            await fleet.vms[f"unix:{folder}/vm1"].wait_for(lambda _: False)
        assert await fleet.rescan() == ((), ())
        assert isinstance((await fleet.refresh())[1].error, MonitorConnectError)
        (folder / "vm1").unlink()
        os.link(vms[2].qmp, folder / "vm2")
        assert await fleet.rescan() == ((f"unix:{folder}/vm2",), (f"unix:{folder}/vm1",))
        assert list(fleet.vms) == [f"unix:{folder}/vm0"]
        assert [each.error for each in await fleet.refresh()] == [None, None]


async def test_a_vm_that_has_left_is_not_attached_by_work_that_was_begun_before(tmp_path: Path) -> None:
    dead_socket(tmp_path / "a")
    second = dead_socket(tmp_path / "b")

    async with Fleet(directory=tmp_path, concurrency=1) as fleet:
        results = fleet.attach()
        assert "left behind" in str((await anext(results)).error)
        second.unlink()
        await fleet.rescan()
        dead_socket(second)
        rest = [each async for each in results]
    assert all(isinstance(each.error, MonitorConnectError) for each in rest)
    assert fleet.addresses == (f"unix:{tmp_path}/a",)


async def test_a_socket_that_is_there_again_is_another_vm_even_with_the_same_inode(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(first))
    async with Fleet([first, second], reply_timeout=2) as fleet:
        await fleet.attach()
        # File systems hand a free inode out again at once; whoever had it before has no claim.
        first.rename(second)
        results = await fleet.attach()
    assert "no such path" in str(results[0].error)
    assert "nobody listens" in str(results[1].error)


async def test_a_fleet_without_a_directory_has_none_to_look_into() -> None:
    async with Fleet() as fleet:
        with pytest.raises(ValueError, match="no directory"):
            await fleet.rescan()
