"""Two processes that would keep the same record."""

import os
import signal
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import RecordLockedError
from tests.crash.points import INTENT_SAVED
from tests.crash.stage import START, STOP, TARGET, stage
from tests.crash.zygote import NAME, Job, Zygote

pytestmark = pytest.mark.qemu


async def test_a_second_controller_is_told_the_pid_and_may_come_in_once_the_first_is_killed(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with stage(STOP, qmp_sockets=3) as at, Zygote() as zygote:
        job = Job(str(at.guest.qmp), str(record), str(TARGET), STOP.policy.value, 5, hold_at=INTENT_SAVED)
        pid = await zygote.start(job)
        await zygote.crossed(INTENT_SAVED)
        with pytest.raises(RecordLockedError, match=f"process {pid}") as caught:
            await qmpvcpu.attach(at.guest.sockets[2], name=NAME, record=record)
        assert caught.value.pid == pid
        os.kill(pid, signal.SIGKILL)
        assert (await zygote.end()).code == -signal.SIGKILL
        async with qmpvcpu.attach(at.guest.sockets[2], name=NAME, record=record) as vm:
            assert vm.interrupted is not None
            assert (vm.interrupted.start, vm.interrupted.target) == (START, TARGET)
            assert vm.layout.enabled == START
