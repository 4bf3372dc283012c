"""What a change is of: the VM as it runs, its next boot, or both; on a real QEMU."""

import asyncio
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import qmpvcpu
from qmpvcpu import (
    Affect,
    ConfigDeniedError,
    DenialReason,
    DomainConfig,
    MonitorLostError,
    OnFailure,
    Outcome,
    RecordError,
    RecordLockedError,
    Recovery,
    StepDeniedError,
    TransitionError,
    TransitionOutcome,
    TransitionReport,
    UnplugPendingError,
    UnplugRefusedError,
)
from qmpvcpu.domainxml import read_identity
from qmpvcpu.model.transition import ConfigOutcome
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.domainxml.domains import document, domain_of_rows, said
from tests.exchange import exchange
from tests.record.conftest import listing
from tests.record.faults import meddling

pytestmark = pytest.mark.qemu

CHANGES = {"device_add", "device_del"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The document of a VM that is started with vCPUs 0 and 1 of 8."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "vm.xml").write_bytes(document(domain_of_rows("00------")))
    return folder / "vm.xml"


async def next_boot(config: Path) -> str:
    """What the document says, in the characters of ``domain_of_rows``."""
    assert [name for name in listing(config.parent) if name.endswith((".tmp", ".lock"))] == []
    return said((await DomainConfig.load(config)).domain)


def failing(name: str) -> Callable[[int, str, Callable[[], Any]], Any]:
    """Have the disk be full at each call of that name."""

    def fail(_number: int, call: str, do: Callable[[], Any]) -> Any:
        if call == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return do()

    return fail


async def test_a_change_of_the_next_boot_sends_nothing(config: Path) -> None:
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
        with exchange() as sent:
            assert await vm.plug(3, affect=Affect.CONFIG) == {3}
            assert await next_boot(config) == "00-+----"
            assert await vm.plug(affect=Affect.CONFIG) == {2}
            assert await next_boot(config) == "00++----"
            assert await vm.unplug(1, affect=Affect.CONFIG) == {1}
            assert await next_boot(config) == "0-++----"
            assert await vm.set_state(1, enabled=True, affect=Affect.CONFIG) == {1}
            assert await vm.set_state(2, enabled=False, affect=Affect.CONFIG) == {2}
            assert await next_boot(config) == "0+-+----"
            report = await vm.set_map("0,5", affect=Affect.CONFIG)
            assert await next_boot(config) == "0----+--"
            counted = await vm.set_count(3, affect=Affect.CONFIG)
            assert counted.target == {0, 1, 5}
            room = await vm.set_max(6)
            assert (room.outcome, room.max) == (ConfigOutcome.WRITTEN, 6)
            assert await next_boot(config) == "00---+"
        assert sent == []
        assert vm.layout.enabled == {0, 1}
    assert report.affect is Affect.CONFIG
    assert report.live is None
    assert report.outcome is TransitionOutcome.REACHED
    assert report.start == {0, 1, 3}
    assert report.target == {0, 5}
    assert report.steps == ()
    assert report.config is not None
    assert report.config.outcome is ConfigOutcome.WRITTEN
    assert TransitionReport.from_json(report.to_json()) == report


async def test_both_are_changed_once_the_vm_as_it_runs_is_as_wished(config: Path) -> None:
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
        report = await vm.set_map("0,2-3", affect=Affect.BOTH)
        assert await next_boot(config) == "0-++----"
        assert (report.outcome, report.live) == (TransitionOutcome.REACHED, TransitionOutcome.REACHED)
        assert str(report.config) == "next boot 0-1 to 0,2-3: WRITTEN"
        assert str(report.config) in str(report)
        assert TransitionReport.from_json(report.to_json()) == report
        again = await vm.set_map("0,2-3", affect=Affect.BOTH)
        assert again.config is not None
        assert again.config.outcome is ConfigOutcome.UNCHANGED
        assert await vm.plug(affect=Affect.BOTH) == {1}
        assert await vm.unplug(2, affect=Affect.BOTH) == {2}
        assert await next_boot(config) == "0+-+----"
        assert vm.layout.enabled == {0, 1, 3}
        counted = await vm.set_count(5, affect=Affect.BOTH)
        assert counted.config is not None
        assert counted.config.target == vm.layout.enabled == {0, 1, 2, 3, 4}


async def test_for_the_vm_as_it_runs_alone_everything_is_as_ever(config: Path) -> None:
    before = config.read_bytes()
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
        report = await vm.set_map("0,2")
    assert config.read_bytes() == before
    assert (report.affect, report.config, report.live) == (Affect.LIVE, None, TransitionOutcome.REACHED)
    shown = report.to_json()
    assert (shown["affect"], shown["live"], shown["config"]) == ("live", "reached", None)


@pytest.mark.parametrize("policy", [OnFailure.STOP, OnFailure.REVERT])
async def test_a_guest_that_refuses_keeps_its_vcpu_at_the_next_boot_too(config: Path, policy: OnFailure) -> None:
    before = config.read_bytes()
    stubborn = Behaviour.refusing(0x82).for_slot(1)
    async with (
        MicroGuest(boot=2, behaviour=stubborn) as guest,
        qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm,
    ):
        with pytest.raises(TransitionError) as caught:
            await vm.set_map("0,2", affect=Affect.BOTH, on_failure=policy)
        report = caught.value.report
        assert report.live is report.outcome is not TransitionOutcome.REACHED
        assert report.config is not None
        assert report.config.outcome is ConfigOutcome.NOT_TRIED
        assert report.config.reason == "the running VM is not as requested"
        assert TransitionReport.from_json(report.to_json()) == report
        with pytest.raises(UnplugRefusedError):
            await vm.unplug(1, affect=Affect.BOTH)
        with pytest.raises(UnplugRefusedError):
            await vm.set_state(1, enabled=False, affect=Affect.BOTH)
    assert config.read_bytes() == before
    assert await next_boot(config) == "00------"


async def test_what_either_side_cannot_have_is_denied_before_anything_is_sent(config: Path) -> None:
    config.write_bytes(document(domain_of_rows("00--")))  # less room than the VM has
    before = config.read_bytes()
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
        denied: list[tuple[Callable[[], Any], type[Exception], str]] = [
            (lambda: vm.set_map("0-1,6", affect=Affect.BOTH), ConfigDeniedError, "the document has vCPUs 0 to 3"),
            (lambda: vm.set_count(6, affect=Affect.BOTH), ConfigDeniedError, "the document has 1 to 4 vCPUs"),
            (lambda: vm.plug(6, affect=Affect.BOTH), ConfigDeniedError, "plug of vCPU 6 at the next boot"),
            (lambda: vm.plug(6, affect=Affect.CONFIG), ConfigDeniedError, "plug of vCPU 6 at the next boot"),
            (lambda: vm.set_state(6, enabled=True, affect=Affect.BOTH), ConfigDeniedError, "vCPUs 0 to 3"),
            (lambda: vm.unplug(0, affect=Affect.BOTH), StepDeniedError, "never leaves"),
            (lambda: vm.unplug(0, affect=Affect.CONFIG), ConfigDeniedError, "is always enabled"),
            (lambda: vm.plug(1, affect=Affect.BOTH), StepDeniedError, "plugged"),
            (lambda: vm.set_map("0-2,9", affect=Affect.BOTH), StepDeniedError, "this machine has 0 to 7"),
            (lambda: vm.set_max(0), ConfigDeniedError, "1 to 16384"),
        ]
        with exchange() as sent:
            for ask, kind, words in denied:
                with pytest.raises(kind, match=words):
                    await ask()
        assert not CHANGES & set(sent)
        assert vm.layout.enabled == {0, 1}
        await vm.plug(2, affect=Affect.CONFIG)
        await vm.plug(3, affect=Affect.CONFIG)
        with pytest.raises(ConfigDeniedError, match="4 of its 4 vCPUs") as caught:
            await vm.plug(affect=Affect.CONFIG)
        assert caught.value.reason is DenialReason.MACHINE_FULL
    assert config.read_bytes() != before


async def test_without_anything_that_keeps_the_next_boot_there_is_none_to_change() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        with exchange() as sent:
            for affect in (Affect.CONFIG, Affect.BOTH):
                for ask in (
                    vm.plug(3, affect=affect),
                    vm.unplug(3, affect=affect),
                    vm.set_state(3, enabled=True, affect=affect),
                    vm.set_map("0,3", affect=affect),
                    vm.set_count(2, affect=affect),
                    vm.set_max(4),
                ):
                    with pytest.raises(ConfigDeniedError, match="config=PATH") as caught:
                        await ask
                    assert caught.value.reason is DenialReason.NO_CONFIG
        assert sent == []


async def test_a_record_keeps_the_next_boot_beside_the_vm_as_it_runs(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(boot=2) as guest:
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            await vm.set_map("0-3", affect=Affect.CONFIG)
            assert vm.layout.enabled == {0, 1}
            await vm.plug(5, affect=Affect.BOTH)
            await vm.plug(6)
            with pytest.raises(ConfigDeniedError) as caught:
                await vm.set_max(4)
            assert caught.value.reason is DenialReason.RECORD_MAXIMUM
        assert read_identity(record.read_bytes()).metadata is not None
        assert said((await DomainConfig.load(record)).domain) == "00de-c--"
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            report = await vm.set_count(3, affect=Affect.CONFIG)
            assert report.start == {0, 1, 2, 3, 5}
            await vm.unplug(1)
        metadata = read_identity(record.read_bytes()).metadata
        assert metadata is not None
        assert metadata.intent is None
        assert metadata.next_boot == {0, 1, 2}
        assert vm.layout.enabled == {0, 5, 6}
    async with MicroGuest(boot=1) as guest, qmpvcpu.attach(guest.qmp, record=record, name=vm.layout.vm.name) as vm:
        await vm.plug(2)
    assert said((await DomainConfig.load(record)).domain) == "0cb-----", (
        "it is what was asked for, whoever started it"
    )


async def test_a_record_keeps_the_next_boot_of_a_vm_that_libvirt_would_want_more_of(tmp_path: Path) -> None:
    # libvirt takes no x86 domain of more than 255 vCPUs without an iommu, of which QEMU tells nothing.
    async with (
        MicroGuest(boot=1, max_vcpus=288) as guest,
        qmpvcpu.attach(guest.qmp, record=tmp_path / "vm.xml") as vm,
    ):
        report = await vm.set_map("0,200-210", affect=Affect.CONFIG)
        assert report.outcome is TransitionOutcome.REACHED
        assert report.target == {0, *range(200, 211)}
    written = read_identity((tmp_path / "vm.xml").read_bytes()).metadata
    assert written is not None
    assert written.next_boot == {0, *range(200, 211)}


@pytest.mark.parametrize("kept_in", ["document", "record"])
async def test_the_next_boot_can_be_changed_while_the_vm_is_lost(config: Path, kept_in: str, tmp_path: Path) -> None:
    place: dict[str, Any] = {"config": config} if kept_in == "document" else {"record": tmp_path / "record.xml"}
    async with MicroGuest(boot=2) as guest:
        vm = await qmpvcpu.attach(guest.qmp, name="vm", **place)
        guest.process.kill()
        with pytest.raises(MonitorLostError):
            await vm.wait_for(lambda layout: len(layout.enabled) > 2, timeout=20)
        with pytest.raises(MonitorLostError):
            await vm.plug(3, affect=Affect.BOTH)
        await vm.set_map("0-3", affect=Affect.CONFIG)
        assert (await DomainConfig.load(next(iter(place.values())))).domain.enabled == {0, 1, 2, 3}
        await vm.close()
        with pytest.raises(MonitorLostError, match="closed by this side"):
            await vm.set_map("0", affect=Affect.CONFIG)


async def test_a_disk_that_is_full_when_the_next_boot_is_written_leaves_the_vm_as_wished(config: Path) -> None:
    before = config.read_bytes()
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
        with meddling(failing("write")), pytest.raises(TransitionError) as caught:
            await vm.set_map("0-3", affect=Affect.BOTH)
        report = caught.value.report
        assert (report.outcome, report.live) == (TransitionOutcome.PARTIAL, TransitionOutcome.REACHED)
        assert report.config is not None
        assert report.config.outcome is ConfigOutcome.FAILED
        assert "No space left on device" in report.config.reason
        assert "No space left on device" in str(caught.value)
        assert isinstance(caught.value.__cause__, RecordError)
        assert caught.value.outcome is Outcome.CHANGED
        assert TransitionReport.from_json(report.to_json()) == report
        with meddling(failing("write")), pytest.raises(RecordError) as unwritten:
            await vm.plug(5, affect=Affect.BOTH)
        assert unwritten.value.outcome is Outcome.CHANGED
        assert "plug of vCPU 5 is done, and the next boot is as it was" in str(unwritten.value)
        assert vm.layout.enabled == {0, 1, 2, 3, 5}
        assert config.read_bytes() == before
        with meddling(failing("write")), pytest.raises(RecordError) as unchanged:
            await vm.set_count(4, affect=Affect.CONFIG)
        assert unchanged.value.outcome is Outcome.UNCHANGED
        await vm.set_map("0-3,5", affect=Affect.BOTH)
    assert await next_boot(config) == "00++-+--"


async def test_two_controllers_that_change_one_document_are_told_apart_before_anything_is_sent(config: Path) -> None:
    async with (
        MicroGuest(boot=3, behaviour=Behaviour.hanging().for_slot(2)) as guest,
        qmpvcpu.attach(guest.qmp, name="vm", config=config) as one,
        qmpvcpu.attach(guest.sockets[1], name="vm", config=config) as other,
    ):
        asking = asyncio.create_task(one.unplug(2, affect=Affect.BOTH))
        await one.wait_for(lambda layout: 2 in layout.pending)
        with exchange() as sent:
            for affect in (Affect.BOTH, Affect.CONFIG):
                with pytest.raises(RecordLockedError):
                    await other.plug(5, affect=affect)
                with pytest.raises(RecordLockedError):
                    await other.set_map("0-2,5", affect=affect)
        assert not CHANGES & set(sent)
        await one.plug(4, affect=Affect.BOTH)  # its own calls share the lock
        await guest.set_behaviour(Behaviour.complying())
        assert await asking == {2}
        assert await next_boot(config) == "00--+---"
        await other.plug(5, affect=Affect.BOTH)
    assert await next_boot(config) == "00--++--"


async def test_calls_that_go_side_by_side_are_all_at_the_next_boot(config: Path) -> None:
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
        await asyncio.gather(*(vm.plug(affect=Affect.BOTH) for _ in range(4)), vm.plug(7, affect=Affect.CONFIG))
        assert await next_boot(config) == "00++++-+"
        await asyncio.gather(
            vm.unplug(2, affect=Affect.BOTH),
            vm.unplug(3, affect=Affect.BOTH),
            vm.set_state(4, enabled=False, affect=Affect.BOTH),
        )
    assert await next_boot(config) == "00---+-+"


async def test_what_somebody_else_writes_meanwhile_is_not_written_over(config: Path) -> None:
    async with (
        MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest,
        qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm,
    ):
        asking = asyncio.create_task(vm.unplug(2, affect=Affect.BOTH))
        await vm.wait_for(lambda layout: 2 in layout.pending)
        config.write_bytes(document(domain_of_rows("0000----")))
        await guest.set_behaviour(Behaviour.complying())
        with pytest.raises(RecordError, match="changed by somebody else") as caught:
            await asking
        assert caught.value.outcome is Outcome.CHANGED
        assert vm.layout.enabled == {0, 1}
    assert await next_boot(config) == "0000----"


async def test_a_late_answer_does_not_change_the_next_boot(config: Path) -> None:
    async with (
        MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest,
        qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm,
    ):
        with pytest.raises(UnplugPendingError):
            await vm.unplug(1, affect=Affect.BOTH, timeout=0)
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_for(lambda layout: 1 not in layout.enabled, timeout=20)
        assert await next_boot(config) == "00------"
        await vm.set_state(1, enabled=False, affect=Affect.BOTH)  # nothing is left to be sent
    assert await next_boot(config) == "0-------"


async def test_cancelling_a_caller_leaves_no_half(config: Path) -> None:
    async with MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest:
        async with qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
            asking = asyncio.create_task(vm.unplug(1, affect=Affect.BOTH))
            await vm.wait_for(lambda layout: 1 in layout.pending)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await guest.set_behaviour(Behaviour.complying())
            await vm.wait_for(lambda layout: 1 not in layout.enabled, timeout=20)
        assert await next_boot(config) == "0-------", "it was still written"


def make_a_link(path: Path) -> None:
    """Have the document be elsewhere, and a symlink lead there."""
    path.rename(path.with_suffix(".was"))
    path.symlink_to(path.with_suffix(".was"))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another name": (lambda path: path.write_bytes(document(domain_of_rows("0-", name="other"))), "the document of"),
    "a symlink": (make_a_link, "a symlink"),
    "nothing": (Path.unlink, "no such file"),
    "no XML": (lambda path: path.write_text("x"), "not well-formed"),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_document_that_cannot_be_used_is_told_when_attaching(config: Path, what: str) -> None:
    spoil, words = BAD[what]
    async with MicroGuest() as guest:
        async with qmpvcpu.attach(guest.qmp, name="vm", config=config) as vm:
            spoil(config)
            with exchange() as sent:
                for affect in (Affect.CONFIG, Affect.BOTH):
                    with pytest.raises(qmpvcpu.QmpVcpuError, match=words):
                        await vm.plug(3, affect=affect)
            assert not CHANGES & set(sent)
        with pytest.raises(qmpvcpu.QmpVcpuError, match=words):
            await qmpvcpu.attach(guest.qmp, name="vm", config=config)
        assert len(asyncio.all_tasks()) == len({asyncio.current_task(), *guest_tasks()})


def guest_tasks() -> set[asyncio.Task[Any]]:
    """The tasks of the guest's own."""
    return {task for task in asyncio.all_tasks() if "GuestVm" in repr(task.get_coro())}


async def test_the_record_is_no_document_beside_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a record keeps the next boot without it"):
        await qmpvcpu.attach(tmp_path / "qmp", record=tmp_path / "vm.xml", config=tmp_path / "vm.xml")


DIES = """
import asyncio, os, sys
import qmpvcpu
from qmpvcpu import Affect
from qmpvcpu.record import config
async def main(address, record, path, call, when):
    save = config._save
    config._save_in_thread = lambda *given: os._exit(9 if when == "before" or save(*given) else 1)
    async with qmpvcpu.attach(address, name="vm", record=record, config=path) as vm:
        await eval(call)
asyncio.run(main(*sys.argv[1:]))
"""


async def died_writing(
    guest: MicroGuest, record: Path, config: Path, call: str, when: Literal["before", "after"] = "before"
) -> None:
    """Have a process of its own make *call*, and die just before, or after, the next boot is written."""
    arguments = [sys.executable, "-c", DIES, str(guest.qmp), str(record), str(config), call, when]
    process = await asyncio.create_subprocess_exec(*arguments)
    assert await process.wait() == 9


CALLS = {
    "set_map": ("vm.set_map('0-1,3', affect=Affect.BOTH)", "00-+----"),
    "set_count": ("vm.set_count(3, affect=Affect.BOTH)", "00+-----"),
    "plug": ("vm.plug(5, affect=Affect.BOTH)", "00---+--"),
    "unplug": ("vm.unplug(1, affect=Affect.BOTH)", "0-------"),
    "set_state": ("vm.set_state(1, enabled=False, affect=Affect.BOTH)", "0-------"),
}


@pytest.mark.parametrize("call", CALLS)
async def test_who_dies_between_the_two_has_the_next_boot_written_by_recover(
    config: Path, tmp_path: Path, call: str
) -> None:
    words, after = CALLS[call]
    record = tmp_path / "record.xml"
    before = config.read_bytes()
    async with MicroGuest(boot=2) as guest:
        await died_writing(guest, record, config, words)
        assert config.read_bytes() == before
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
            with pytest.raises(ConfigDeniedError, match="it was to be written to ") as caught:
                await vm.recover(Recovery.FINISH)
            assert caught.value.reason is DenialReason.NO_CONFIG
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record, config=config) as vm:
            assert vm.interrupted is not None
            looked = await vm.recover(Recovery.REPORT)
            assert looked is not None
            assert (looked.affect, looked.outcome) == (Affect.BOTH, TransitionOutcome.PARTIAL)
            assert str(looked.config).endswith("NOT_TRIED: not done")
            with exchange() as sent:
                report = await vm.recover(Recovery.FINISH)
            assert not CHANGES & set(sent), "the VM as it runs was as wished"
            assert report is not None
            assert report.config is not None
            assert report.config.outcome is ConfigOutcome.WRITTEN
            assert vm.interrupted is None
        assert await next_boot(config) == after
        metadata = read_identity(record.read_bytes()).metadata
        assert metadata is not None
        assert metadata.intent is None


async def test_who_dies_with_the_next_boot_written_has_nothing_left_to_be_done(config: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.xml"
    async with MicroGuest(boot=2) as guest:
        await died_writing(guest, record, config, CALLS["set_map"][0], "after")
        assert said((await DomainConfig.load(config)).domain) == CALLS["set_map"][1]
        async with qmpvcpu.attach(
            guest.qmp, name="vm", record=record, config=config, on_interrupted=Recovery.FINISH
        ) as vm:
            assert vm.interrupted is None
            assert vm.layout.enabled == {0, 1, 3}
    assert await next_boot(config) == CALLS["set_map"][1]


async def test_a_record_keeps_its_promise_of_a_next_boot_in_one_file(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with (
        MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest,
        qmpvcpu.attach(guest.qmp, record=record) as vm,
    ):
        asking = asyncio.create_task(vm.set_map("0,2", affect=Affect.BOTH))
        await vm.wait_for(lambda layout: 1 in layout.pending)
        promised = read_identity(record.read_bytes()).metadata
        assert promised is not None
        assert promised.intent is not None
        assert promised.intent.next_boot == {0, 2}
        assert promised.intent.config is None
        assert promised.next_boot is None
        await guest.set_behaviour(Behaviour.complying())
        report = await asking
        assert report.config is not None
        assert report.config.path == str(record)
        kept = read_identity(record.read_bytes()).metadata
        assert kept is not None
        assert kept.intent is None
        assert kept.next_boot == {0, 2}


async def test_reverting_what_was_cut_short_leaves_the_next_boot(config: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.xml"
    before = config.read_bytes()
    async with MicroGuest(boot=2) as guest:
        await died_writing(guest, record, config, CALLS["set_map"][0])
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record, config=config) as vm:
            report = await vm.recover(Recovery.REVERT)
            assert report is not None
            assert report.outcome is TransitionOutcome.REVERTED
            assert vm.layout.enabled == {0, 1}
    assert config.read_bytes() == before


async def test_the_record_of_what_is_under_way_says_what_the_next_boot_is_to_have(
    config: Path, tmp_path: Path
) -> None:
    record = tmp_path / "record.xml"
    async with (
        MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest,
        qmpvcpu.attach(guest.qmp, name="vm", record=record, config=config) as vm,
    ):
        tasks = [asyncio.create_task(vm.unplug(each, affect=Affect.BOTH)) for each in (1, 2)]
        await vm.wait_for(lambda layout: layout.pending == {1, 2})
        metadata = read_identity(record.read_bytes()).metadata
        assert metadata is not None
        assert metadata.intent is not None
        assert metadata.intent.next_boot == {0}
        assert metadata.intent.config == str(config)
        await guest.set_behaviour(Behaviour.complying())
        await asyncio.gather(*tasks)
        metadata = read_identity(record.read_bytes()).metadata
        assert metadata is not None
        assert metadata.intent is None
