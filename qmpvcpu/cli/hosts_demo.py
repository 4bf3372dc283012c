"""hosts demo: the test kit's demo of many hosts on the command line's stage."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from qmpvcpu.cli.failures import failure
from qmpvcpu.cli.options import OUTPUT_OPTIONS, File, command, flag, option
from qmpvcpu.cli.output import Column, Line, Table
from qmpvcpu.cli.progress import sentence
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.documents.form import NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED, document
from qmpvcpu.errors import UnfitServerError, printable
from qmpvcpu.testing.directory import TemporaryDirectoryError
from qmpvcpu.testing.hostsdemo import Fate, VmRow, play
from qmpvcpu.testing.nats import NatsNotFoundError, NatsStartError
from qmpvcpu.testing.netns import NetworkError
from qmpvcpu.testing.qemu import QemuNotFoundError, QemuProcessError

if TYPE_CHECKING:
    from qmpvcpu.cli.terminal import Screen
    from qmpvcpu.model.hosts import VmKey

_STYLES: Final = {Fate.STARTS: "dim", Fate.WAITS: "dim", Fate.BEGUN: "yellow", Fate.RUNS: "yellow"}
_HINTS: Final = (
    "",
    "All of it is gone now. On hosts of your own (docs/fleet.md):",
    "  nats-server -js -sd /var/lib/nats                                        somewhere",
    "  qmpvcpu agent --nats nats://THERE:4222 --dir /run/vms --record RECORDS   on each host",
    "  export QMPVCPU_NATS=nats://THERE:4222                                    wherever you are",
    "  qmpvcpu fleet list",
    "  qmpvcpu fleet set 0-3 --where 'host=*' --at-once 3 --per-host 1 --on-failure revert",
    "  qmpvcpu campaign list; qmpvcpu campaign run; qmpvcpu watch",
)


@command(
    option("--qemu", metavar="PATH", type=File(), help="The QEMU to run. Else QMPVCPU_QEMU, else the newest."),
    flag("--no-namespaces", "Hosts are directories, also where network namespaces can be made (as root)."),
    *OUTPUT_OPTIONS,
)
async def demo(shell: Shell, *, qemu: str | None = None, no_namespaces: bool = False) -> CommandResult:
    """Change the VMs of three hosts while a guest refuses, a host dies, and the changing program is killed.

    Starts a NATS server, agents for three hosts, and nine VMs with the guest of qmpvcpu demo. What is shown is read
    from the server and from the QEMUs, and compared with what was expected. At the end everything is gone.

    Hosts are network namespaces where they can be made, which takes root, else directories.

      qmpvcpu hosts demo

      qmpvcpu hosts demo --no-namespaces --json

    Exit codes: 0 every step went as expected; 1 one did not; 2 no QEMU, no NATS server, or qmpvcpu[hosts] is not
    installed; 3 one of them did not start, or was lost; 130 stopped by a signal.
    """
    stage = _Stage(shell)
    try:
        with stage.shown():
            played = await play(stage, qemu=qemu, separate=False if no_namespaces else None)
    except (QemuNotFoundError, NatsNotFoundError, UnfitServerError, TemporaryDirectoryError) as error:
        return failure(error, shell, NOT_SENT)
    except (QemuProcessError, NatsStartError, NetworkError) as error:
        return failure(error, shell, NO_ANSWER)
    if not stage.draws:
        shell.say("", _table(played.rows))
    code = NOT_REACHED if played.differences else REACHED
    return CommandResult(code, document(**played.content), _HINTS, played.differences)


class _Stage:
    """The command line as the demo's stage: lines, and on a terminal a table below them that changes.

    Attributes:
        draws: Whether there is such a table.
    """

    def __init__(self, shell: Shell) -> None:
        self.done = shell.done
        self.draws = shell.out.draws and not shell.options.json
        self._shell = shell
        self._screen: Screen | None = None
        self._told: dict[VmKey, Fate] = {}
        self._started = time.monotonic()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table inside; it stays as it is at the end."""
        if not self.draws:
            yield
            return
        with self._shell.out.live(keep=True) as self._screen:
            yield

    def say(self, *parts: str | tuple[str, str], at: float | None = None) -> None:
        if at is None:
            self._shell.say(Line(*parts))
            return
        row = Table(Column(), Column(fold=True))
        row.add(Line((f"{at:5.1f} s", "dim")), Line(*parts))
        self._shell.say(row)

    def show(self, rows: Sequence[VmRow]) -> None:
        if self._screen is not None:
            self._screen.draw("", _table(rows))
            return
        for row in rows:
            if self._told.get(row.vm, row.fate) is not row.fate and row.fate in (Fate.RUNS, Fate.OVER):
                words = _words(row) if row.fate is Fate.OVER else "begun"
                self.say(f"  {row.vm}  {row.vcpus}  ", words, at=time.monotonic() - self._started)
            self._told[row.vm] = row.fate


def _table(rows: Sequence[VmRow]) -> Table:
    table = Table(
        Column("host/VM", fold=True), Column("vCPUs"), Column("the change", fold=True), Column("by", fold=True)
    )
    for row in rows:
        vcpus = "" if row.vcpus is None else str(row.vcpus)
        style = "dim" if row.is_dead else ""
        table.add(printable(str(row.vm)), vcpus, Line(_words(row)), printable(row.begun_by), style=style)
    return table


def _words(row: VmRow) -> tuple[str, str]:
    """Return how far the change of a VM is, and the style of that."""
    words, style = row.fate.value, _STYLES.get(row.fate, "")
    match row.fate:
        case Fate.BEGUN:
            words = "its host is asked"
        case Fate.RUNS:
            words = "begun" if row.event is None else sentence(row.event)
        case Fate.OVER if row.code == REACHED:
            words, style = "reached", "green"
        case Fate.OVER:
            words, style = printable(row.why), "red"
    return f"{words}{'; its host is dead' * row.is_dead}", style
