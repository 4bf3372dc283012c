"""agent: carries out on this host what is wished of its VMs over NATS."""

import asyncio
import contextlib
import socket
from typing import Any, Final

from qmpvcpu.cli.options import JSON, REPLY_TIMEOUT, VERBOSE, File, Seconds, command, flag, option
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.server import SERVER_OPTIONS, connected, take_server
from qmpvcpu.cli.vms import PATTERN, Vms
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.errors import LeaseTakenError
from qmpvcpu.model.hosts import Operation, host_inbox

_RESYNC_S: Final = 30.0


@command(
    *SERVER_OPTIONS,
    option("--host", metavar="NAME", help="What to call this host; else its hostname. Each name has one agent."),
    option(
        "--dir",
        "directories",
        metavar="DIR",
        type=File(),
        multiple=True,
        help="Serve the VMs whose QMP sockets are in this directory; may be repeated.",
    ),
    PATTERN,
    option(
        "--record",
        metavar="DIR",
        type=File(),
        help="Keep each VM's durable record in this directory, as fleet does. Needed, unless --read-only.",
    ),
    option(
        "--agent",
        metavar="PATTERN",
        help="Where each VM's guest agent is, such as '{dir}/{stem}.agent': {dir}, {stem} and {name} are those of its"
        " QMP socket.",
    ),
    option(
        "--allow",
        metavar="WORDS",
        help=f"What it may do, with commas: {', '.join(each.value for each in Operation)}. Else all.",
    ),
    flag("--read-only", "Change nothing: --allow list,plan,statistics."),
    option(
        "--only",
        metavar="GLOB",
        multiple=True,
        help="Serve only VMs whose names match, such as 'web-*'; may be repeated. Others are not even shown.",
    ),
    option(
        "--rescan",
        metavar="SECONDS",
        type=Seconds(some="looking takes some time"),
        default=5.0,
        help="How often to look for VMs that came or went.",
    ),
    REPLY_TIMEOUT,
    JSON,
    VERBOSE,
)
async def agent(
    shell: Shell,
    *,
    host: str | None,
    directories: tuple[str, ...],
    pattern: str,
    allow: str | None,
    read_only: bool,
    only: tuple[str, ...],
    rescan: float,
    **server: Any,
) -> CommandResult:
    """Serve the VMs of this host over NATS, until a signal: carry out wishes, and report what happens.

    Run one on each host. It only connects outwards, and reconnects by itself. If it dies, the next one finishes what
    it had begun, and repeats nothing. nats micro ls shows it. The first signal waits for changes under way; the
    second one stops them at their next safe points.

      qmpvcpu agent --nats nats://10.0.0.1:4222 --dir /run/vms --record /var/lib/qmpvcpu

      qmpvcpu agent --nats tls://nats.example:4222 --creds /etc/qmpvcpu/web1.creds --dir /run/vms --read-only

    Exit codes: 0 a signal came; 2 bad usage, another agent has this host's name, or the server refuses; 3 no
    connection to the server.
    """
    where = take_server(server)
    from qmpvcpu.hosts import AgentPolicy, HostAgent  # not at the top: help needs none of it

    if read_only and allow is not None:
        raise BadUsageError("--read-only and --allow: one of them")
    names = only or ("*",)
    policy = AgentPolicy.read_only(names) if read_only else AgentPolicy(_operations(allow), names)
    if not directories:
        raise BadUsageError("which VMs? Name the directories of their QMP sockets: --dir DIR, as often as needed")
    if shell.options.record is None and not policy.only_reads:
        raise BadUsageError("--record DIR is needed: after a crash, records say what was begun (or use --read-only)")
    name = host or socket.gethostname()
    async with contextlib.AsyncExitStack() as stack:
        fleets = [
            await stack.enter_async_context(
                Vms((), directory, pattern).opened(
                    shell, read_only=policy.only_reads, may_be_empty=True, resync_interval=_RESYNC_S
                )
            )
            for directory in directories
        ]
        bus = await stack.enter_async_context(connected(where, f"qmpvcpu agent of {name}", inbox=host_inbox(name)))
        try:
            serving = HostAgent(bus, name, fleets, policy=policy, rescan=rescan)
        except ValueError as error:
            raise BadUsageError(f"--host: {error}") from error
        running = asyncio.ensure_future(serving.run())

        async def stop() -> None:
            shell.note("finishing what is under way; a second signal stops it at its next safe point")
            serving.stop()

        with shell.signals.stopped_by(stop):
            try:
                serves = asyncio.ensure_future(serving.serves.wait())
                await asyncio.wait({running, serves}, return_when=asyncio.FIRST_COMPLETED)
                serves.cancel()
                if not running.done():
                    shell.note(f"{name}: serving {', '.join(directories)} at {where}")
                await asyncio.shield(running)
            except LeaseTakenError as error:
                raise BadUsageError(
                    f"another agent has the name {name}: give this one another, --host NAME; "
                    "if that one has died, the name is free some seconds later"
                ) from error
            finally:
                running.cancel()
                await asyncio.wait({running})
    content = document(host=name, signal=shell.signals.came)
    return CommandResult(REACHED, content)


def _operations(allow: str | None) -> frozenset[Operation]:
    """Return what the agent is to do.

    Raises:
        BadUsageError: A word is unknown.
    """
    if allow is None:
        return frozenset(Operation)
    try:
        return frozenset(Operation(word.strip()) for word in allow.split(","))
    except ValueError as error:
        known = ", ".join(each.value for each in Operation)
        raise BadUsageError(f"--allow {allow}: the words are {known}") from error
