"""hosts init and list: what many hosts meet under on a NATS server, and which are there."""

from typing import Any, Final

import click

from qmpvcpu.cli.app import LazyGroup, pass_on
from qmpvcpu.cli.options import OUTPUT_OPTIONS, Seconds, command, option
from qmpvcpu.cli.output import Column, Table
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.server import SERVER_OPTIONS, connected, take_server
from qmpvcpu.cli.show import age
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.errors import printable
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import HOST_LEASES, LEASES, HostInfo

_LEASE_S: Final = 15.0

_HELP = """Prepare a NATS server for many hosts, and show the hosts.

Each host runs qmpvcpu agent. Agents and your commands connect to a NATS server with JetStream. See docs/fleet.md.

  qmpvcpu hosts demo                    see it work, with hosts of its own

  qmpvcpu hosts list --nats nats://10.0.0.1:4222

  qmpvcpu fleet list --nats nats://10.0.0.1:4222

Exit codes: 0 done; 2 bad usage, or the server refuses; 3 no connection to the server.
"""

hosts = LazyGroup(
    "hosts",
    {
        "init": ("hosts:init", "Prepare a server or a cluster for hosts."),
        "list": ("hosts:list_", "Show which hosts have an agent."),
        "demo": ("hosts_demo:demo", "See it work, with three hosts of its own."),
    },
    help=_HELP,
    params=[*OUTPUT_OPTIONS],
    callback=pass_on,
    no_args_is_help=False,
)


@command(
    option("--replicas", metavar="N", type=click.IntRange(1, 5), help="How many servers keep each bucket."),
    option(
        "--lease",
        metavar="SECONDS",
        type=Seconds(some="agents renew it over the network"),
        default=_LEASE_S,
        help="How long an agent may be silent before its host counts as dead.",
    ),
    *SERVER_OPTIONS,
    *OUTPUT_OPTIONS,
)
async def init(_: Shell, *, replicas: int | None, lease: float, **server: Any) -> CommandResult:
    """Make the buckets and the stream of many hosts. Those that exist stay as they are.

    On a single server the first agent does this by itself. In a cluster you choose the number of replicas.

      qmpvcpu hosts init --replicas 3 --nats nats://10.0.0.1:4222

    Exit codes: 0 they are there; 2 bad usage, or the server refuses; 3 no connection to the server.
    """
    where = take_server(server)
    async with connected(where, "qmpvcpu hosts init", replicas=replicas, lease_s=lease) as bus:
        return CommandResult(REACHED, document(server=bus.server_name), (f"{where} is ready",))


@command(*SERVER_OPTIONS, *OUTPUT_OPTIONS)
async def list_(shell: Shell, **server: Any) -> CommandResult:
    """Show which hosts have an agent now, what it may do, and how many VMs it has.

      qmpvcpu hosts list --nats nats://10.0.0.1:4222

    Exit codes: 0 shown; 2 bad usage, or the server refuses; 3 no connection to the server.
    """
    where = take_server(server)
    async with connected(where, "qmpvcpu hosts list") as bus:
        leases = await (await bus.bucket(LEASES)).all(HOST_LEASES)
        now = bus.now()  # the server's time, which reading the leases has shown
    found = []
    for key, entry in sorted(leases.items()):
        try:
            found.append(HostInfo.read(key, entry.value or b""))
        except ValueError as error:
            shell.note(f"warning: {printable(f'the lease {key} cannot be read: {error}')}")
    table = Table(
        Column("host"), Column("VMs", "right"), Column("does", fold=True), Column("version"), Column("since")
    )
    for info in found:
        operations = printable(", ".join(info.operations))
        since = age(max(now - info.since, 0.0))
        table.add(printable(info.host), str(info.vms), operations, printable(info.version), since)
    content = document(hosts=[to_json(info) for info in found])
    return CommandResult(REACHED, content, (table,) if found else ("no host has an agent",))
