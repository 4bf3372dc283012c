"""A server with the very files of ``docs/nats``, and members who may connect to it."""

import asyncio
import contextlib
import importlib.util
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import nats
from nats.aio.client import Client

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.model.hosts import client_inbox, host_inbox
from qmpvcpu.testing.nats import NatsServer, free_ports
from tests.docs.blocks import ROOT, block

FILES = ROOT / "docs" / "nats"
MEMBERS = (
    ("admin", "admin"),
    ("host", "web1"),
    ("host", "web2"),
    ("operator", "alice"),
    ("operator", "bob"),
    ("reader", "grafana"),
)
NAMES = ("nats1", "nats2", "nats3")


def program(name: str) -> ModuleType:
    """The program *name* of the pages, as a module."""
    spec = importlib.util.spec_from_file_location(name, FILES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def accounts(members: Path) -> str:
    """What the program prints, run as the page says."""
    argv = [sys.executable, "-I", str(FILES / "accounts.py"), str(members)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def certificates(directory: Path) -> None:
    """Make the certificates as the page says; the server is called what it is called here."""
    commands = block("docs/nats-server.md", "certificates").text.replace("DNS:nats1", "DNS:nats1,IP:127.0.0.1")
    subprocess.run(["bash", "-euc", commands], cwd=directory, check=True, capture_output=True)


def by_imports_alone(conf: str) -> str:
    """The accounts, with no permissions of users: what holds then is what is imported."""
    return re.sub(r", permissions: \{.*?\n    \}\}\]", "}]", conf, flags=re.DOTALL)


def in_one_account(conf: str) -> str:
    """The same users with the same permissions, all in one account."""
    users = re.findall(r"users: \[(\{[^}]*permissions: \{.*?\n    \}\})\]", conf, re.DOTALL)
    admin = re.findall(r'^      (\{nkey: "U\w+"\})$', conf, re.MULTILINE)
    return f"accounts {{ QMPVCPU {{ jetstream: enabled, users: [{', '.join([*admin, *users])}] }} }}"


@dataclass
class Permitted:
    """The server, or the servers of a cluster."""

    directory: Path
    members: tuple[tuple[str, str], ...]
    change: Callable[[str], str]
    servers: list[NatsServer] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    def accounts(self) -> str:
        """The accounts of all members; who has no key yet gets one."""
        nkey = program("nkey")
        for _, name in self.members:
            if name not in self.keys:
                self.keys[name] = nkey.main(str(self.directory / f"{name}.nkey"))
        path = self.directory / "members"
        path.write_text("".join(f"{kind} {name} {self.keys[name]}\n" for kind, name in self.members))
        return self.change(accounts(path))

    async def add(self, kind: str, name: str) -> None:
        """Let one more in, as the page says: the servers read their files again, twice."""
        self.members = (*self.members, (kind, name))
        text = self.accounts()
        for server in self.servers:
            (server.directory / "accounts.conf").write_text(text)
        for server, adapted in zip(self.servers * 2, self.adapted * 2, strict=True):
            await server.reload(adapted)

    def address(self, name: str, server: int = 0) -> ServerAddress:
        """Where *name* connects, and how."""
        return ServerAddress(
            self.servers[server].url.replace("nats:", "tls:"),
            nkey=self.directory / f"{name}.nkey",
            tls_ca=self.directory / "ca.pem",
        )

    def inbox(self, name: str) -> str:
        """Where everything arrives that is for *name*."""
        return host_inbox(name) if ("host", name) in self.members else client_inbox(name)

    @contextlib.asynccontextmanager
    async def bus(self, name: str, server: int = 0, on_lost: Callable[[], None] | None = None) -> AsyncIterator[Bus]:
        """The connection of the member *name*."""
        address, inbox = self.address(name, server), self.inbox(name)
        async with await Bus.connect(address, name=name, inbox=inbox, on_lost=on_lost) as bus:
            yield bus

    @contextlib.asynccontextmanager
    async def raw(self, name: str, server: int = 0) -> AsyncIterator["Raw"]:
        """The same with nats-py alone: what an attacker has."""
        raw = Raw()
        context = ssl.create_default_context(cafile=self.directory / "ca.pem")
        raw.client = await nats.connect(
            self.servers[server].url.replace("nats:", "tls:"),
            tls=context,
            nkeys_seed=str(self.directory / f"{name}.nkey"),
            inbox_prefix=self.inbox(name),
            error_cb=raw.took,
            allow_reconnect=False,
        )
        try:
            yield raw
        finally:
            await raw.client.close()


class Raw:
    """A connection of nats-py, and what the server said about it."""

    client: Client

    def __init__(self) -> None:
        self.errors: list[str] = []

    async def took(self, error: Exception) -> None:
        self.errors.append(str(error))

    async def publish(self, subjects: Iterable[str]) -> None:
        """Publish on *subjects*, and wait until the server has looked at each."""
        for subject in subjects:
            await self.client.publish(subject, b"forged")
        await self.client.flush()

    async def listen(self, subjects: Iterable[str]) -> None:
        """Subscribe to *subjects*, and wait until the server has looked at each."""
        for subject in subjects:
            await self.client.subscribe(subject)
        await self.client.flush()

    def refused(self, subjects: Iterable[str], action: str = "publish") -> list[str]:
        """Which of these the server has refused so far with an error that names the subject."""
        told = "\n".join(self.errors).lower()
        return [subject for subject in subjects if f'{action} to "{subject.lower()}"' in told]


@contextlib.asynccontextmanager
async def permitted(
    directory: Path,
    *,
    conf: str = "server.conf",
    binary: Path | None = None,
    change: Callable[[str], str] = lambda text: text,
    prepare: bool = True,
) -> AsyncIterator[Permitted]:
    """The server of ``docs/nats/CONF``; *change* is made to the accounts."""
    world = Permitted(directory, MEMBERS, change)
    certificates(directory)
    count = 3 if conf == "cluster.conf" else 1
    ports, routes = free_ports(2 * count)[:count], free_ports(2 * count)[count:]
    files = {name: (directory / name).read_bytes() for name in ("ca.pem", "server.pem", "server.key")}
    files["accounts.conf"] = world.accounts().encode()
    for number in range(count):
        text = (FILES / conf).read_text()
        for shown, here in {
            "/etc/nats/tls/": "",
            "/var/lib/nats": "data",
            "0.0.0.0:4222": f"127.0.0.1:{ports[number]}",
            "0.0.0.0:6222": f"127.0.0.1:{routes[number]}",
            "$NATS_NAME": NAMES[number],
            **{
                f"nats://{name}:6222": f"nats://127.0.0.1:{route}" for name, route in zip(NAMES, routes, strict=False)
            },
        }.items():
            text = text.replace(shown, here)
        if binary is not None:  # as the comment there says of servers before 2.10
            text = re.sub(r"^  sync_interval:.*\n", "", text, flags=re.MULTILINE)
        world.adapted.append(text)
        world.servers.append(
            NatsServer(
                binary=binary, port=ports[number], config=text, files=files, jetstream=False, name=NAMES[number]
            )
        )
    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as starting:
            for server in world.servers:
                starting.create_task(stack.enter_async_context(server))
        if prepare:
            async with world.bus("admin") as bus:
                await bus.prepare(replicas=count, lease_s=2.0)
        yield world
