"""The main job on a real Linux: a chosen vCPU in and out, in the guest's own words."""

import asyncio
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Pending, Proof, Unplugged, UnplugRefusedError, VcpuMap
from qmpvcpu.testing.linuxguest import LinuxGuest

pytestmark = pytest.mark.guest
README = Path(__file__).parents[2] / "README.md"


async def test_a_chosen_vcpu_enters_and_leaves_a_running_linux(
    guest: LinuxGuest, third: Callable[[int], int]
) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        assert vm.layout.enabled == {0, 1}
        await vm.plug(5, proof=Proof.ACKNOWLEDGED, require_proof=True)
        assert vm.layout.enabled == {0, 1, 5}
        assert await guest.wait_online(lambda cpus: len(cpus) == 3) == VcpuMap([0, 1, third(5)])
        assert await vm.unplug(5, timeout=30) == {5}
        assert await guest.wait_online(lambda cpus: len(cpus) == 2) == VcpuMap([0, 1])


async def test_a_linux_that_refuses_is_heard_at_once_and_not_at_the_deadline(guest: LinuxGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(2)
        await guest.wait_online(lambda cpus: len(cpus) == 3)
        await guest.refuse()
        started = time.monotonic()
        with pytest.raises(UnplugRefusedError, match="device is busy") as caught:
            await vm.unplug(2, timeout=30)
        assert caught.value.code == 0x82
        # Not a speed test: waiting for the timeout, as others do, would be 30 s.
        assert time.monotonic() - started < 15
        assert vm.layout.enabled == {0, 1, 2}
        await guest.comply()
        assert await vm.unplug(2, timeout=30) == {2}
        assert await guest.wait_online(lambda cpus: len(cpus) == 2) == VcpuMap([0, 1])


async def test_a_boot_vcpu_leaves_a_running_linux_and_comes_back(guest: LinuxGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        assert await vm.unplug(1) == {1}
        assert await guest.wait_online(lambda cpus: len(cpus) == 1) == VcpuMap([0])
        await vm.plug(1)
        assert await guest.wait_online(lambda cpus: len(cpus) == 2) == VcpuMap([0, 1])
        assert vm.layout[1].device_id == "vcpu1"


async def test_linux_answers_late_what_nobody_waited_for(guest: LinuxGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        await guest.wait_online(lambda cpus: len(cpus) == 3)
        request = await vm.request_unplug(3)
        assert isinstance(await request.wait(0), Pending)
        assert isinstance(await request.wait(30), Unplugged)
        assert await guest.wait_online(lambda cpus: len(cpus) == 2) == VcpuMap([0, 1])


async def test_the_script_in_the_readme_does_it_to_a_linux(guest: LinuxGuest, tmp_path: Path) -> None:
    found = re.search(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", found[1], str(guest.qmp)), cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert output.decode().splitlines() == ["plugged: 3 now: 0-1,3", "unplugged: 3 now: 0-1"]
    assert b"<vcpu placement='static' current='2'>" in (tmp_path / "vm.xml").read_bytes()
