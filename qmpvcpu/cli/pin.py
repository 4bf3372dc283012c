"""pin and sched: where QEMU's threads run on the host, and how they are scheduled; shown, or changed."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qmpvcpu.cli.change_options import NEXT_BOOT_OPTIONS, next_boot_file
from qmpvcpu.cli.config import change_config, check_next_boot
from qmpvcpu.cli.options import VM_OPTIONS, command, flag, option
from qmpvcpu.cli.output import Column, Line, Table
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import headline
from qmpvcpu.cli.wishes import (
    CORE_SCHEDULING,
    EXCLUSIVE,
    HostCpus,
    OfVcpus,
    Schedule,
    check_used,
    check_wish,
    place,
    wish_of,
)
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import RecordError, printable
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.options import Affect
from qmpvcpu.model.vcpumap import VcpuMap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpvcpu.model.placement import Place, Placement, QemuThread, Scheduler
    from qmpvcpu.record.config import DomainConfig
    from qmpvcpu.vm.controller import VcpuController

_RESTORE: Final = flag("--restore", "Move every thread back to its place in the record (--record).")


@command(
    click.Argument(["pins"], metavar="[VCPU=CPUS]...", nargs=-1, type=OfVcpus(HostCpus())),
    option("--emulator", metavar="CPUS", type=HostCpus(), help="Which host CPUs the emulator threads run on."),
    EXCLUSIVE,
    CORE_SCHEDULING,
    _RESTORE,
    *NEXT_BOOT_OPTIONS,
    *VM_OPTIONS,
)
async def pin(
    shell: Shell,
    *,
    pins: tuple[tuple[VcpuMap, VcpuMap], ...],
    emulator: VcpuMap | None,
    exclusive: bool,
    core_scheduling: str | None,
    **given: Any,
) -> CommandResult:
    """Pin vCPUs to host CPUs; without an argument, show where each of QEMU's threads runs.

    VCPU may be a set: 0-3=8-11 lets each of the four run on any of 8 to 11. Other threads stay where they are.
    Running threads move at once. With --record the pins are kept, so a vCPU plugged later is born in its place.

    The table shows each thread with its id, host CPUs, scheduler, the host CPU it last ran on, the NUMA node of that
    CPU, and its place, if it has one. A thread that has drifted is yellow.

    QEMU must run on this host. No cgroup is changed.

      qmpvcpu pin --qmp /run/vm.qmp

      qmpvcpu pin 0=8 1=9 2-3=10-11 --emulator 0-1 --exclusive --qmp /run/vm.qmp

      qmpvcpu pin 3=11 --affect both --config vm.xml --qmp /run/vm.qmp

      qmpvcpu pin --restore --record vm.xml --qmp /run/vm.qmp

    Exit codes: 0 shown, or moved; 1 a thread could not be moved, and the others were moved back; 2 bad usage
    or input, QEMU's threads cannot be found, or the host does not allow it: nothing was changed; 3 no connection, or
    QEMU lost; 4 record unreadable or locked; 130 stopped by a signal.
    """
    wish = wish_of(pin=pins, emulator_cpus=emulator, exclusive=exclusive, core_scheduling=core_scheduling)
    return await _place(shell, wish, **given)


@command(
    click.Argument(["scheds"], metavar="[VCPU=POLICY]...", nargs=-1, type=OfVcpus(Schedule())),
    option("--emulator", metavar="POLICY", type=Schedule(), help="The scheduler of the emulator threads."),
    _RESTORE,
    *NEXT_BOOT_OPTIONS,
    *VM_OPTIONS,
)
async def sched(
    shell: Shell,
    *,
    scheds: "tuple[tuple[VcpuMap, Scheduler], ...]",
    emulator: "Scheduler | None",
    **given: Any,
) -> CommandResult:
    """Set the scheduler of vCPUs; without an argument, show that of each of QEMU's threads.

    POLICY is other (the kernel's default), batch, idle, fifo:PRIORITY or rr:PRIORITY, with a priority from 1 to 99.
    VCPU may be a set, as in pin. A vCPU under fifo or rr gives its host CPU to no other program while its guest
    works: pin it to one that nothing else needs, least of all the emulator threads.

      qmpvcpu sched --qmp /run/vm.qmp

      qmpvcpu sched 2-3=fifo:10 --emulator other --qmp /run/vm.qmp

      qmpvcpu sched 0-3=batch --affect config --config vm.xml

    Exit codes: 0 shown, or set; 1 a thread could not be changed, and the others were changed back; 2 bad usage
    or input, QEMU's threads cannot be found, or the host does not allow it: nothing was changed; 3 no connection, or
    QEMU lost; 4 record unreadable or locked; 130 stopped by a signal.
    """
    return await _place(shell, wish_of(sched=scheds, emulator_scheduler=emulator), **given)


async def _place(
    shell: Shell, wish: "Placement | None", *, restore: bool, affect: Affect, config: str | None, base: str | None
) -> CommandResult:
    """Do what *wish* says; None: show what is so."""
    next_boot = next_boot_file(affect, config, shell.options.record, base)
    _check_together(shell, wish, affect, restore=restore)
    if restore and base is None:
        _check_record(Path(shell.options.record or ""))
    if wish is None and not restore:
        async with shell.attach(read_only=True) as vm:
            threads = await vm.host.threads()
            return _result(vm, threads, affect)

    def follow(config: "DomainConfig") -> None:
        place(config, wish)

    if affect is Affect.CONFIG:
        return await change_config(shell, next_boot, follow)
    async with shell.attach(config=config, base=base) as vm:
        check_wish(vm, wish)
        if wish is not None:
            check_used(shell, vm, wish, (), "name the record, or plug it with --pin and --sched")
        elif not vm.host.placement:
            raise BadUsageError(f"--restore: {shell.options.record} has no placement")
        await check_next_boot(affect, config, follow)
        await vm.host.place(wish, affect=affect)
        return _result(vm, await vm.host.threads(), affect)


def _check_together(shell: Shell, wish: "Placement | None", affect: Affect, *, restore: bool) -> None:
    if restore and wish is not None:
        raise BadUsageError("--restore moves threads to their place in the record: name nothing else with it")
    if restore and shell.options.record is None:
        raise BadUsageError("--restore: back to where? Name the VM's record with --record PATH")
    if restore and affect is not Affect.LIVE:
        raise BadUsageError(f"--restore moves threads of the running VM: it goes without --affect {affect.value}")
    if wish is None and affect is not Affect.LIVE:
        raise BadUsageError(f"--affect {affect.value}: what is to change? Name it, such as 3=..., or --emulator ...")


def _check_record(record: Path) -> None:
    """Make sure that there is a record: attaching would begin a new one, which says nothing of threads.

    Raises:
        RecordError: There is none. What else is wrong with it is found when it is read.
    """
    with contextlib.suppress(OSError):
        if not record.is_symlink() and not record.exists():
            raise RecordError(record, "there is no record of that name, so the placement is not known")


def _result(vm: "VcpuController", threads: "Sequence[QemuThread]", affect: Affect) -> CommandResult:
    affected = {} if affect is Affect.LIVE else {"affect": affect.value}
    content = document(threads=threads_json(threads), **affected, **state_json(vm.layout))
    return CommandResult(REACHED, content, (headline(vm.layout), "", thread_table(threads)))


def threads_json(threads: "Sequence[QemuThread]") -> list[dict[str, Any]]:
    """Return where each of QEMU's threads runs, and its place."""
    return [{**to_json(thread), "drifted": thread.drifted} for thread in threads]


def thread_table(threads: "Sequence[QemuThread]") -> Table:
    """Return the same for people."""
    wanted = any(thread.wanted for thread in threads)
    table = Table(
        Column("thread"),
        Column("tid", "right"),
        Column("host CPUs", fold=True),
        Column("scheduler"),
        Column("last on", "right"),
        Column("node", "right"),
        *([Column("place", fold=True)] if wanted else []),
    )
    for thread in threads:
        name = printable(thread.name) if thread.vcpu is None else f"vCPU {thread.vcpu}"
        host_cpu, node = ("" if each is None else str(each) for each in (thread.host_cpu, thread.node))
        found = thread.found
        cells: list[str | Line] = [name, str(thread.tid), str(found.cpus or ""), str(found.scheduler or "")]
        cells += [host_cpu, node, *([_said(thread.wanted)] if wanted else [])]
        table.add(*cells, style="bold yellow" if thread.drifted else "")
    return table


def _said(place: "Place") -> str:
    return ", ".join(str(each) for each in (place.cpus, place.scheduler) if each is not None)


def drift_lines(threads: "Sequence[QemuThread]") -> list[str]:
    """Return a line for each thread that has drifted."""
    return [
        printable(f"{_whose(thread)} has drifted to {thread.found}; its place is {thread.wanted}")
        for thread in threads
        if thread.drifted
    ]


def _whose(thread: "QemuThread") -> str:
    return f"thread {thread.tid} ({thread.name})" if thread.vcpu is None else f"vCPU {thread.vcpu}"
