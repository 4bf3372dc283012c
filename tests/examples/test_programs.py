"""The programs in docs/examples do what they say, each with a real QEMU."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu.events import UnplugAcknowledged
from qmpvcpu.testing import Behaviour, MicroGuest, best_qemu, probe_accelerator, rom_image
from tests.examples.running import EXAMPLES, running
from tests.waiting import until

pytestmark = pytest.mark.qemu

PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))


async def the_guest_to_be_ready(words: Path) -> None:
    await until(lambda: b"R" in words.read_bytes(), within=30)


@contextlib.asynccontextmanager
async def vmms_words(tmp_path: Path, behaviour: Behaviour) -> AsyncIterator[list[object]]:
    """What the VMM is run with: its socket, and a QEMU whose guest tells in a file when it is ready."""
    qemu, pid = best_qemu(), tmp_path / "pid"
    (tmp_path / "guest.rom").write_bytes(rom_image(behaviour))
    machine = [
        "-machine",
        "q35",
        "-accel",
        await probe_accelerator(qemu),
        "-m",
        "16",
        "-nodefaults",
        "-display",
        "none",
    ]
    machine += ["-smp", "1,maxcpus=8,sockets=8", "-debugcon", f"file:{tmp_path / 'words'}", "-pidfile", str(pid)]
    try:
        yield [tmp_path / "web1.qmp", qemu, *machine, "-bios", tmp_path / "guest.rom"]
    finally:
        if pid.exists():  # it is gone when QEMU has ended
            os.kill(int(pid.read_text()), signal.SIGKILL)


async def test_the_vmm_keeps_its_client_and_its_events(tmp_path: Path) -> None:
    async with vmms_words(tmp_path, Behaviour.complying()) as words, running("vmm.py", *words) as vmm:
        await vmm.hear(r"^up with vCPUs 0 of 8$")
        await the_guest_to_be_ready(tmp_path / "words")
        await vmm.tell("0,2-3")
        await vmm.hear(r"^REACHED: vCPUs 0 to 0,2-3,")
        await vmm.tell("0,3")
        await vmm.hear(r"^REACHED: vCPUs 0,2-3 to 0,3,")
        await vmm.tell("0-9")
        await vmm.hear(r"denied, nothing was sent")
        await vmm.tell("quit")
        await vmm.hear(r"^event: SHUTDOWN$")
        assert await vmm.end() == 0
        assert "Traceback" not in vmm.said


async def test_the_vmm_finds_its_vm_again_after_it_was_killed_and_finishes(tmp_path: Path) -> None:
    other = tmp_path / "other.qmp"
    async with vmms_words(tmp_path, Behaviour.slow(500)) as first:
        words = [*first, "-qmp", f"unix:{other},server=on,wait=off"]
        async with running("vmm.py", *words) as vmm:
            await vmm.hear(r"^up with vCPUs 0 of 8$")
            await the_guest_to_be_ready(tmp_path / "words")
            await vmm.tell("0,2-3")
            await vmm.hear(r"^REACHED: vCPUs 0 to 0,2-3,")
            async with qmpvcpu.attach(other) as onlooker:
                await vmm.tell("0,5")  # the guest takes its time to give up 2 and 3
                async for event in onlooker.events():
                    if isinstance(event, UnplugAcknowledged):
                        break
                vmm.process.kill()
                await vmm.process.wait()
        async with running("vmm.py", *words) as vmm:
            await vmm.hear(r"^an earlier run has left the VM running$")
            await vmm.hear(r"^up with vCPUs ")
            await vmm.hear(r"^finishing what was under way: REACHED: .* to 0,5,")
            await vmm.tell("quit")
            await vmm.hear(r"^event: SHUTDOWN$")
            assert await vmm.end() == 0
            assert "Traceback" not in vmm.said
        async with running("vmm.py", *words) as vmm:  # the next VM of that name
            await vmm.hear(r"^up with vCPUs 0 of 8$")
            await vmm.tell("quit")
            assert await vmm.end() == 0


async def test_the_script_follows_load_past_a_refusal_and_a_late_answer(tmp_path: Path) -> None:
    load = tmp_path / "load"

    def set_load(value: float) -> None:
        (tmp_path / "new").write_text(str(value))
        (tmp_path / "new").rename(load)

    set_load(0.7)
    words = ["--load", load, "--every", "0.01", "--patience", "0.1"]
    async with (
        MicroGuest() as guest,
        qmpvcpu.attach(guest.process.sockets[1]) as vm,
        running("follow_load.py", guest.qmp, *words) as script,
    ):
        set_load(2.6)
        await script.hear(r"^0 -> 0-3$")
        await guest.set_behaviour(Behaviour.refusing(0x82).for_slot(3))
        set_load(1.4)
        await script.hear(r"^0-3 -> 0,3$|^0-3 -> 0-1,3$")
        await script.hear(r"^vCPU 3 stays: device is busy$")
        await guest.set_behaviour(Behaviour.hanging())
        await script.hear(r"may leave later$")
        await guest.set_behaviour()
        await vm.wait_for(lambda layout: len(layout.enabled) == 2 and not layout.pending, timeout=10)
        script.process.terminate()
        assert "Traceback" not in script.said


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: str) -> dict[str, Any]:
    writer.write(f"{request}\n".encode())
    return await answer(reader)


async def answer(reader: asyncio.StreamReader) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(await reader.readline())
    return content


async def test_the_service_resizes_or_undoes_and_tells_late_answers(tmp_path: Path) -> None:
    socket, record = tmp_path / "resize", tmp_path / "vm.xml"
    async with MicroGuest() as guest:
        words = [guest.qmp, socket, "--record", record, "--timeout", "0.2"]
        async with running("resize_service.py", *words) as service:
            await service.hear("^listening on")
            one, other = [await asyncio.open_unix_connection(socket) for _ in range(2)]
            done = await ask(*one, '{"map": "0,2-5"}')
            assert (done["outcome"], done["plugged"], len(done["steps"])) == ("REACHED", "0,2-5", 4)
            assert (await ask(*other, '{"count": 5}'))["outcome"] == "REACHED"

            await guest.set_behaviour([Behaviour.refusing(0x82).for_slot(4), Behaviour.complying()])
            done = await ask(*one, '{"map": "0,2-3"}')
            assert (done["outcome"], done["plugged"]) == ("REVERTED", "0,2-5")
            assert [step["verdict"]["kind"] for step in done["steps"] if step["ids"] == "4"] == ["refused"]

            await guest.set_behaviour(Behaviour.hanging())
            done = await ask(*one, '{"map": "0,2-4"}')
            assert (done["outcome"], done["pending"]) == ("REVERT_INCOMPLETE", "5")
            await guest.set_behaviour()
            late = {"late": "UNPLUGGED", "ids": "5", "plugged": "0,2-4"}
            assert [await answer(one[0]), await answer(other[0])] == [late, late]

            assert (await ask(*one, "what?"))["error"].startswith("no JSON")
            one[1].write(b"\xff\n")
            assert (await answer(one[0]))["error"].startswith("no JSON")
            assert (await ask(*one, '{"size": 3}'))["error"].startswith("a request is")
            assert (await ask(*one, '{"map": "0-99"}'))["state"] == "unchanged"
            for _, writer in (one, other):
                writer.close()
            guest.process.kill()
            await service.hear("is gone$")
            assert await service.end() == 1
            assert b"current='4'" in record.read_bytes()
            assert "Traceback" not in service.said


@pytest.mark.parametrize("words", [["follow_load.py", "none"], ["resize_service.py", "none", "resize"]])
async def test_a_vm_that_is_not_there_is_told_in_one_line(words: list[str]) -> None:
    async with running(*words) as program:
        assert await program.end() == 1
    assert program.said.startswith("cannot speak QMP on unix:none: no such path (is QEMU running")
    assert program.said.count("\n") == 1


async def test_a_run_that_was_killed_half_way_is_finished_by_the_next(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest:
        words = [guest.qmp, record, "0,5", "--interrupted", "finish"]
        async with qmpvcpu.attach(guest.process.sockets[1]) as onlooker, running("recover.py", *words) as killed:
            async for event in onlooker.events():
                if isinstance(event, UnplugAcknowledged):
                    break
            killed.process.kill()
            await killed.process.wait()
        async with running("recover.py", *words) as again:
            await again.hear("^an earlier run was cut short on its way from 0-2 to 0,5; now:$")
            await again.hear("^PARTIAL: ")
            await guest.set_behaviour()
            assert await again.end() == 0
            assert "plug 5: PLUGGED" in again.said
            assert again.said.count("REACHED: ") == 2  # what was interrupted, and then its own wish
        async with qmpvcpu.attach(guest.qmp) as vm:
            assert vm.layout.enabled == {0, 5}


async def test_a_refused_run_says_so_and_leaves_nothing_interrupted(tmp_path: Path) -> None:
    async with MicroGuest(boot=3, behaviour=Behaviour.refusing(0x82).for_slot(1)) as guest:
        async with running("recover.py", guest.qmp, tmp_path / "vm.xml", "0,5") as refused:
            assert await refused.end() == 1
            assert refused.said.startswith("REVERTED: vCPUs 0-2 to 0,5")
        async with running("recover.py", guest.qmp, tmp_path / "vm.xml", "0-2") as same:
            assert await same.end() == 0
            assert same.said.startswith("REACHED")


async def test_the_guest_to_try_things_on_behaves_as_it_is_told() -> None:
    async with running("guest.py") as program:
        path = (await program.hear("^/.*$"))[0]
        async with qmpvcpu.attach(path) as vm:
            await vm.plug(3)
            await program.tell("refuse")
            await program.hear("^done$")
            with pytest.raises(qmpvcpu.UnplugRefusedError):
                await vm.unplug(3)
            await program.tell("explode")
            await program.hear("^one of: comply, refuse, hang, silent$")
            await program.tell("comply")
            await program.hear("^done$")
            assert await vm.unplug(3) == {3}
        assert await program.end() == 0
    assert not Path(path).exists()


@pytest.mark.guest
def test_the_ci_job_passes_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "test_shrink.py").write_bytes((EXAMPLES / "test_shrink.py").read_bytes())
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shrink.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "7 passed" in ran.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert text.startswith('"""')
    what = "pytest" if name.startswith("test_") else "python"
    assert f"{what} {name}" in text.split('"""')[1]
    assert f"]({name})" in (EXAMPLES / "README.md").read_text()
