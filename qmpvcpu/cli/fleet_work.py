"""What ``qmpvcpu fleet`` does: one call of the library's Fleet, the results taken as they come."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from qmpvcpu.cli.answer import Answer
from qmpvcpu.cli.fleet import FleetBulk, FleetOptions
from qmpvcpu.cli.fleet_show import Row, Told, answer
from qmpvcpu.cli.maps import Wish
from qmpvcpu.cli.options import BadUsageError, Permits, check_seconds
from qmpvcpu.cli.reports import intent_text
from qmpvcpu.cli.run import Shell
from qmpvcpu.errors import printable
from qmpvcpu.fleet import Fleet, Results
from qmpvcpu.model.report import TransitionReport
from qmpvcpu.model.transition import Affect
from qmpvcpu.vm.controller import VcpuController


async def list_all(shell: Shell, options: FleetOptions) -> Answer:
    """Attach to every VM, and show what there is."""
    async with _opened(shell, options, reply_timeout=shell.reply_timeout, read_only=True) as fleet:
        results = fleet.attach()
        return await _see_through(shell, fleet, results, results.aclose, Told(fleet.addresses), whole=True)


async def set_all(shell: Shell, options: FleetOptions, wish: Wish, bulk: FleetBulk, permits: Permits) -> Answer:
    """Make it so in every VM, each for itself."""
    wish = wish.checked()
    async with _opened(shell, options) as fleet:
        setting = _Setting(shell, wish, bulk, permits, Told(fleet.addresses))
        results = fleet.each(setting.one)

        async def stop() -> None:
            shell.err.print("stopping at the next safe points; once more abandons at once", soft_wrap=True)
            results.stop()
            await setting.stop()

        return await _see_through(shell, fleet, results, stop, setting.told, whole=False)


@contextlib.asynccontextmanager
async def _opened(shell: Shell, options: FleetOptions, **how: Any) -> AsyncIterator[Fleet]:
    """Find the VMs; nothing is connected to yet.

    Raises:
        BadUsageError: There are none.
    """
    fleet = Fleet(
        options.qmp or (),
        directory=options.directory,
        pattern=options.pattern,
        concurrency=options.concurrency,
        record=options.record_of,
        resync_interval=None,
        **how,
    )
    async with fleet:
        if not fleet.addresses:
            raise BadUsageError(f"no socket in {options.directory} matches {options.pattern!r}")
        shell.beside["vms"] = []
        yield fleet


async def _see_through(
    shell: Shell,
    fleet: Fleet,
    results: Results[Any],
    stop: Callable[[], Coroutine[Any, Any, None]],
    told: Told,
    *,
    whole: bool,
) -> Answer:
    """Take the results as they come, and tell how far it is; the first signal does *stop*."""
    started = time.monotonic()
    came: dict[str, Any] = {}
    with shell.stopping.stopped_by(stop):
        async with told.shown(shell.err):
            async for result in results:
                came[result.address] = result
                # If it is abandoned, the document has what came until then.
                shell.beside["vms"].append(Row(result.address, result).as_json(whole=False))
                told.take(result)
    rows = [Row(address, came.get(address)) for address in fleet.addresses]
    return answer(rows, seconds=time.monotonic() - started, whole=whole)


class _Setting:
    """One map, or count, set on each VM; can be stopped gently.

    Attributes:
        told: Shows how it goes.
    """

    def __init__(self, shell: Shell, wish: Wish, bulk: FleetBulk, permits: Permits, told: Told) -> None:
        self.told = told
        self._shell = shell
        self._permits = permits
        self._live = bulk.affect is not Affect.CONFIG
        self._wish = wish
        self._running: dict[asyncio.Task[TransitionReport], VcpuController] = {}
        self._terms: dict[str, Any] = {
            "on_failure": bulk.on_failure,
            "timeout": shell.guest_timeout,
            "total_timeout": check_seconds("--total-timeout", bulk.total_timeout),
            "in_flight": bulk.in_flight,
            "proof": bulk.proof,
            "affect": bulk.affect,
            **dataclasses.asdict(permits),
        }

    async def one(self, vm: VcpuController) -> TransitionReport:
        """Set it on *vm*."""
        if vm.interrupted is not None:
            self._shell.err.print(
                f"{printable(vm.address)}: given up for this: {intent_text(vm.interrupted)}", soft_wrap=True
            )
        steps = self._wish.plan(vm, self._permits).steps if self._live else ()
        if self._wish.count is not None:
            work = vm.set_count(self._wish.count, include_boot=self._wish.include_boot, **self._terms)
        else:
            work = vm.set_map(self._wish.map or "", **self._terms)
        task = asyncio.ensure_future(work)
        self._running[task] = vm
        try:
            async with self.told.following(vm, steps):
                return await task
        finally:
            del self._running[task]

    async def stop(self) -> None:
        """Stop all at their next safe points."""
        await asyncio.gather(*(self._stop_one(task, vm) for task, vm in self._running.items()))

    async def _stop_one(self, task: "asyncio.Task[TransitionReport]", vm: VcpuController) -> None:
        if await vm.cancel() is None:  # it has not begun
            task.cancel()
