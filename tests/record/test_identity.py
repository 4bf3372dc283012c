"""Whose record it is: by uuid, else by a name that was given, else by the very QEMU; never by a label."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu.domainxml import Instance, read_identity
from qmpvcpu.errors import RecordError
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.record.config import DomainConfig
from qmpvcpu.record.owner import Claim, instance_of, is_alive, refuse_other_document
from qmpvcpu.record.record import Record
from tests.domainxml.examples import Q35, layout_of

UUID = "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a"
LAYOUT = layout_of(4, [0, 2], boot=1)
DEAD = Instance(2**22 + 1, 5)  # no thread has such a number
OTHER = Instance(2**22 + 2, 5)
SELF = Instance(0)  # stands for this very thread
WITH_UUID = replace(Q35, uuid=UUID)
NAMED = replace(Q35, uuid=None)
NAMELESS = replace(NAMED, named=False)
CALLED = {"uuid": WITH_UUID, "name": NAMED, "neither": NAMELESS}


def living() -> Instance:
    """This very thread."""
    found = instance_of(threading.get_native_id(), os.getpid())
    assert found is not None
    return found


async def open_(
    path: Path, vm: VmInfo, instance: Instance | None, *, arrived: bool = False, read_only: bool = False
) -> Record:
    return await Record.open(path, Claim(vm.name, vm.uuid, vm.named, instance, arrived), read_only=read_only)


async def written(path: Path, vm: VmInfo, instance: Instance | None) -> bytes:
    record = await open_(path, vm, instance)
    await record.write(replace(LAYOUT, vm=vm))
    await record.close()
    return path.read_bytes()


async def refused(path: Path, vm: VmInfo, instance: Instance | None) -> str:
    before = path.read_bytes()
    with pytest.raises(RecordError) as caught:
        await open_(path, vm, instance)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nor locked
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.xml"


@pytest.mark.parametrize("called", CALLED)
async def test_the_same_qemu_is_the_same_vm_whatever_it_is_called(path: Path, called: str) -> None:
    vm = CALLED[called]
    await written(path, vm, living())
    label = replace(vm, name="another", named=False)
    record = await open_(path, label, living())
    assert record.name == "vm"
    assert record.same_instance
    await record.close()


async def test_a_vm_with_a_uuid_is_the_same_in_another_qemu_under_any_name(path: Path) -> None:
    await written(path, WITH_UUID, DEAD)
    record = await open_(path, replace(WITH_UUID, name="renamed"), OTHER)
    assert (record.name, record.same_instance) == ("renamed", False)
    await record.close()
    told = await refused(path, replace(WITH_UUID, uuid="7" + UUID[1:]), OTHER)
    assert "7f9e0a3e" in told
    assert told.endswith("start QEMU with the record's -uuid")


async def test_a_vm_without_uuid_is_the_same_in_another_qemu_under_the_name_that_it_was_given(path: Path) -> None:
    await written(path, NAMED, DEAD)
    record = await open_(path, NAMED, OTHER)
    assert not record.same_instance
    await record.close()
    told = await refused(path, replace(NAMED, name="other"), OTHER)
    assert "not of 'other'" in told
    assert told.endswith("name another record, or, if it is the same VM, start QEMU with the record's -name")


@pytest.mark.parametrize("before", [NAMED, NAMELESS], ids=["named", "nameless"])
@pytest.mark.parametrize("instance", [OTHER, None], ids=["another QEMU", "an unknown QEMU"])
async def test_a_label_is_no_name(path: Path, before: VmInfo, instance: Instance | None) -> None:
    await written(path, before, DEAD)
    told = await refused(path, NAMELESS, instance)  # whose label is the same
    assert "neither a uuid nor a name" in told
    assert "attach(name=...)" in told


async def test_a_nameless_vm_can_be_told_by_the_name_in_its_record_and_has_that_name_from_then_on(path: Path) -> None:
    await written(path, NAMELESS, DEAD)
    metadata = read_identity(path.read_bytes()).metadata
    assert metadata is not None
    assert metadata.nameless
    await written(path, NAMED, OTHER)
    metadata = read_identity(path.read_bytes()).metadata
    assert metadata is not None
    assert not metadata.nameless


@pytest.mark.parametrize("called", CALLED)
async def test_another_qemu_while_that_of_the_record_runs_is_another_vm(path: Path, called: str) -> None:
    vm = CALLED[called]
    await written(path, vm, living())
    told = await refused(path, vm, OTHER)
    if called != "neither":
        assert "still runs" in told
        assert f"thread {living().host_tid}" in told
        record = await open_(path, vm, OTHER, arrived=True)  # unless the VM has migrated
        assert record.same_instance
        await record.close()


async def test_reading_leaves_no_trace_and_needs_no_lock(path: Path) -> None:
    assert (await open_(path, NAMED, living(), read_only=True)).previous is None
    assert not path.exists()
    await written(path, NAMED, living())
    keeper = await open_(path, NAMED, living())
    names = sorted(each.name for each in path.parent.iterdir())
    reader = await open_(path, NAMED, living(), read_only=True)
    assert reader.previous == keeper.previous
    with pytest.raises(RecordError, match="read_only"):
        await reader.write(LAYOUT)
    await reader.close()
    assert sorted(each.name for each in path.parent.iterdir()) == names
    await keeper.close()


def test_a_thread_is_alive_until_it_ends_and_not_if_its_number_is_used_again() -> None:
    go = threading.Event()
    started = threading.Event()
    found: list[Instance | None] = []

    def run() -> None:
        found.append(instance_of(threading.get_native_id(), os.getpid()))
        started.set()
        go.wait()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    (instance,) = found
    assert instance is not None
    assert instance.start_ticks is not None
    assert is_alive(instance)
    assert not is_alive(instance._replace(start_ticks=instance.start_ticks + 1))
    assert not is_alive(instance._replace(start_ticks=None))  # on another host, for all that is known
    go.set()
    thread.join()
    while Path(f"/proc/self/task/{instance.host_tid}").exists():
        pass
    assert not is_alive(instance)


def test_what_is_left_of_a_process_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        instance = instance_of(child.pid, child.pid)
        assert instance is not None
        assert is_alive(instance)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is left as a zombie
        assert not is_alive(instance)
        assert instance_of(child.pid, child.pid) == Instance(child.pid)


def test_a_thread_with_another_number_in_its_own_pid_namespace_is_found() -> None:
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    script = ["sh", "-c", "echo $$; exec sleep 60"]
    unshare = ["unshare", *root, "--pid", "--fork", "--kill-child", *script]
    with subprocess.Popen(unshare, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            found = instance_of(1, int(child))
            assert found is not None
            assert found.host_tid == 1
            assert found.start_ticks is not None
        finally:
            process.kill()


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("instance", [DEAD, OTHER, None, SELF], ids=["dead", "other", "unknown", "itself"])
async def test_a_next_boot_is_not_kept_in_the_record_of_a_vm_that_runs_elsewhere(
    path: Path, called: str, instance: Instance | None
) -> None:
    vm = CALLED[called]
    await written(path, vm, living())
    config = await DomainConfig.load(path)
    claim = Claim(vm.name, vm.uuid, vm.named, living() if instance is SELF else instance)
    if instance in (None, SELF):
        refuse_other_document(path, config.identity, claim)
    else:
        with pytest.raises(RecordError, match="whose QEMU still runs"):
            refuse_other_document(path, config.identity, claim)
        refuse_other_document(path, config.identity, claim._replace(arrived=True))
    of_the_dead = path.with_name("dead.xml")
    await written(of_the_dead, vm, DEAD)
    refuse_other_document(of_the_dead, (await DomainConfig.load(of_the_dead)).identity, claim)
