"""What makes a guest refuse."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Protocol

from qmpvcpu.certify.judging import not_possible
from qmpvcpu.certify.waiting import LOOK_EVERY_S
from qmpvcpu.vm.controller import VcpuController

_MOST_TASKS: Final = 1024


class Provocation(Protocol):
    """Something that can make the guest refuse; the guests of ``qmpvcpu.testing`` are one."""

    async def refuse(self) -> None:
        """Make the guest refuse to give up any vCPU."""

    async def comply(self) -> None:
        """Make the guest give up vCPUs again."""


class DeadlineTasks:
    """Makes a Linux refuse through its agent, by tasks with deadlines that need every CPU it has.

    Source: Linux vetoes taking a CPU offline that SCHED_DEADLINE reservations need: kernel/sched/core.c.
    """

    def __init__(self, vm: VcpuController, timeout: float) -> None:
        self._vm = vm
        self._timeout = timeout
        self._pids: list[int] = []

    async def refuse(self) -> None:
        """Start as many as Linux admits: one for each CPU, as each needs 94 %. They only sleep."""
        await self._vm.guest.set_online(self._vm.layout.enabled, timeout=self._timeout)  # an offline one leaves
        reserve = "--deadline --sched-runtime 9400000 --sched-deadline 10000000 --sched-period 10000000 0"
        while len(self._pids) < _MOST_TASKS:
            pid = await self._run("chrt", *reserve.split(), "sleep", "300")
            await asyncio.sleep(LOOK_EVERY_S)
            status = await self._ask("guest-exec-status", {"pid": pid})
            if not isinstance(status, dict) or status.get("exited") is not False:
                break
            self._pids.append(pid)
        if not self._pids:
            raise not_possible("its Linux starts no task with a deadline (chrt)")

    async def comply(self) -> None:
        """End them."""
        pids, self._pids = self._pids, []
        if pids:
            await self._run("sh", "-c", f"kill {' '.join(map(str, pids))}")

    async def _run(self, path: str, *arguments: str) -> int:
        started = await self._ask("guest-exec", {"path": path, "arg": [*arguments]})
        pid = started.get("pid") if isinstance(started, dict) else None
        if type(pid) is not int or pid <= 0:
            raise not_possible(f"the agent did not start {path}")
        return pid

    async def _ask(self, command: str, arguments: Mapping[str, Any]) -> Any:
        return await self._vm.guest.execute(command, arguments, timeout=self._timeout)
