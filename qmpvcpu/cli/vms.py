"""Which VMs a command on many is about: some of this host, or those of other hosts."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qmpvcpu.cli.options import NAME, OUTPUT_OPTIONS, READ_RECORD, REPLY_TIMEOUT, File, named_on_the_line, option
from qmpvcpu.cli.result import BadUsageError
from qmpvcpu.cli.run import Shell, check_address
from qmpvcpu.cli.server import SERVER_OPTIONS, find_server, who
from qmpvcpu.errors import QmpVcpuError

if TYPE_CHECKING:
    from pathlib import Path

    from qmpvcpu.bus import ServerAddress
    from qmpvcpu.fleet import Fleet
    from qmpvcpu.model.vm import VmInfo

# What names VMs of this host.
_HERE: Final = {
    "addresses": "qmp",
    "qmp": "qmp",
    "directory": "dir",
    "pattern": "pattern",
    "record": "record",
    "agent": "agent",
}

QMP: Final = option(
    "--qmp",
    "addresses",
    metavar="ADDRESS",
    multiple=True,
    help="A VM's QMP socket; may be repeated. Else $QMPVCPU_QMP, without --dir.",
)
DIRECTORY: Final = option("--dir", "directory", metavar="DIR", type=File(), help="All QMP sockets in this directory.")
PATTERN: Final = option(
    "--pattern", metavar="GLOB", default="*", help="Which paths below --dir: '*.qmp', '*/qmp.sock'."
)
WHERE: Final = option(
    "--where",
    metavar="WORDS",
    default="",
    help="With --nats: which VMs of which hosts: 'host=rack1-* name=web-*', uuid=...; all words must fit.",
)
# Of a command that reads one VM, or many.
READ_MANY_OPTIONS: Final = (
    QMP,
    DIRECTORY,
    PATTERN,
    *SERVER_OPTIONS,
    WHERE,
    NAME,
    READ_RECORD,
    REPLY_TIMEOUT,
    *OUTPUT_OPTIONS,
)
# What such a command has for one VM only.
_OF_ONE: Final = ("name", "record", "agent", "host")


class Vms(NamedTuple):
    """Which VMs.

    Attributes:
        addresses: Addresses of QMP sockets.
        directory: Directory of QMP sockets, or None.
        pattern: Which paths in it.
        concurrency: How many VMs are begun at a time; None: as many as the library does.
        server: The server that other hosts meet at, or None: they are VMs of this host.
        where: Which VMs of those hosts.
    """

    addresses: tuple[str, ...]
    directory: str | None
    pattern: str
    concurrency: int | None = None
    server: "ServerAddress | None" = None
    where: str = ""

    @classmethod
    def take(cls, given: dict[str, Any]) -> "Vms":
        """Take the options that say which VMs out of *given*.

        Raises:
            BadUsageError: They do not go together.
        """
        server = find_server(given)
        vms = cls(**{name: given.pop(name) for name in cls._fields if name in given})
        here = [f"--{option}" for name, option in _HERE.items() if named_on_the_line(name)]
        if server is not None and here and not named_on_the_line("nats"):
            server = None  # the environment's, and these VMs are named
        if server is None:
            if vms.where:
                raise BadUsageError("--where chooses VMs of other hosts: name the server they meet at, --nats URL")
            return vms
        if here:
            raise BadUsageError(f"{here[0]} is about VMs of this host, and --nats about those of others: one of them")
        from qmpvcpu.model.where import Where  # not at the top: few commands have a server

        try:
            Where.parse(vms.where)
        except ValueError as error:
            raise BadUsageError(f"--where: {error}") from error
        return vms._replace(server=server)

    @contextlib.asynccontextmanager
    async def opened(
        self,
        shell: Shell,
        *,
        read_only: bool = False,
        may_be_empty: bool = False,
        resync_interval: float | None = None,
    ) -> "AsyncIterator[Fleet]":
        """Find the VMs; nothing is connected to yet. *may_be_empty*: they come and go.

        Raises:
            BadUsageError: There are none, or they are not named as VMs are.
        """
        if self.server is not None:
            async with self._remote(self.server, shell) as fleet:
                yield fleet
            return
        from qmpvcpu.fleet import Fleet  # not at the top: a command on one VM does without

        fleet = Fleet(
            self._checked(shell.options.qmp),
            directory=self.directory,
            pattern=self.pattern,
            concurrency=self.concurrency,
            record=records_in(shell.options.record),
            agent=self._agent(shell.options.agent),
            reply_timeout=shell.options.reply_timeout,
            read_only=read_only,
            resync_interval=resync_interval,
        )
        async with fleet:
            if not fleet.addresses and not may_be_empty:
                found = f"no socket in {self.directory} matches {self.pattern!r}"
                raise BadUsageError(f"{found}: name another pattern, such as --pattern '*/qmp.sock'")
            yield fleet

    @contextlib.asynccontextmanager
    async def _remote(self, server: "ServerAddress", shell: Shell) -> "AsyncIterator[Fleet]":
        from qmpvcpu.fleet import Fleet  # as above

        fleet = Fleet(
            server,
            where=self.where,
            concurrency=self.concurrency,
            reply_timeout=shell.options.reply_timeout,
            who=who(),
        )
        async with fleet:
            if not fleet.addresses:
                chosen = f"--where {self.where!r} chooses none" if self.where else "no agent has told of any"
                raise BadUsageError(f"no VMs: {chosen}; qmpvcpu hosts list shows which hosts are there")
            yield fleet

    def _agent(self, given: str | None) -> str | Callable[[str], str] | None:
        """Return where the agent of each VM is.

        The environment names the agent of one VM: of the one that it names, and of no other.

        Raises:
            BadUsageError: *given* is no pattern, and there may be more than one VM.
        """
        if not given:
            return None
        from qmpvcpu.fleet.scan import check_agent_pattern, has_placeholder  # as above

        if not has_placeholder(given):
            if (
                len(self.addresses) <= 1
                and self.directory is None
                and (named_on_the_line("agent") or not self.addresses)
            ):
                check_address(given, "--agent")
                return lambda _: given
            if not named_on_the_line("agent"):
                return None
        try:
            check_agent_pattern(given)
        except ValueError as error:
            raise BadUsageError(f"--agent {error}") from error
        return given

    def _checked(self, first: str | None) -> tuple[str, ...]:
        addresses = self.addresses or ((first,) if first and self.directory is None else ())
        if not addresses and self.directory is None:
            raise BadUsageError(
                "which VMs? Name their QMP sockets: --qmp ADDRESS, as often as needed, or --dir DIR; "
                "for those of many hosts the server: --nats nats://HOST:4222"
            )
        from pathlib import PurePath  # as above

        if not self.pattern or PurePath(self.pattern).is_absolute():
            raise BadUsageError(f"--pattern {self.pattern!r}: it is relative to --dir, such as '*.qmp'")
        for address in addresses:
            check_address(address)
        return addresses


def take_many(shell: Shell, given: dict[str, Any]) -> Vms | None:
    """Take the options that say which VMs out of *given*; None: it is one, whose address the shell's options have.

    Where the environment names both a VM and a server, it is the VM.

    Raises:
        BadUsageError: They do not go together, or something was named that is of one VM.
    """
    vms = Vms.take(given)
    if vms.server is not None and shell.options.qmp and not vms.where and not named_on_the_line("nats"):
        vms = vms._replace(server=None)
    if vms.server is None and vms.directory is None and len(vms.addresses) <= 1:
        if vms.addresses:
            shell.options = shell.options._replace(qmp=vms.addresses[0])
        return None
    for name in _OF_ONE:
        if named_on_the_line(name):
            raise BadUsageError(f"--{name} is about one VM: name it with --qmp, and no other")
    return vms


async def look_again(fleet: "Fleet") -> str:
    """Have *fleet* look for VMs that came or went; return why it cannot, "" if it can."""
    if fleet.is_local and fleet.directory is None:
        return ""
    try:
        await fleet.rescan()
    except QmpVcpuError as error:
        return str(error)
    return ""


def records_in(directory: str | None) -> "Callable[[str, VmInfo], Path] | None":
    """Return what tells where the record of a VM is kept; None: nowhere."""
    if directory is None:
        return None
    from qmpvcpu.record.file import absolute  # as above

    kept_in = absolute(directory)

    def record(address: str, vm: "VmInfo") -> "Path":
        name = vm.name if vm.named else vm.uuid
        if not name:
            kind, _, path = address.partition(":")
            name = os.path.normpath(absolute(path)) if kind == "unix" else address
        return kept_in / f"{name.strip('/').replace('/', '-')}.xml"

    return record
