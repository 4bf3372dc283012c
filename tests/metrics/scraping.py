"""The exporter as a process, and what a scrape of it says."""

import asyncio
import contextlib
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.running import Running, running

GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
_DEADLINE = 20.0


@dataclass(frozen=True)
class Page:
    """What a scrape says."""

    text: str
    values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def of(cls, text: str) -> "Page":
        """Parse *text*; no series may be there twice."""
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        values = {(each.name, frozenset(each.labels.items())): each.value for each in samples}
        assert len(values) == len(samples), "a series is there twice"
        return cls(text, values)

    def __getitem__(self, name: str) -> dict[tuple[str, ...], float]:
        """The series of a metric, by the values of their labels in the order of the labels' names."""
        return {
            tuple(value for _, value in sorted(labels)): value
            for (named, labels), value in self.values.items()
            if named == name
        }

    def value(self, name: str, **labels: str) -> float | None:
        """The value of one series, or None."""
        return self.values.get((name, frozenset(labels.items())))

    @property
    def up(self) -> dict[str, float]:
        """Which VMs answer."""
        return {domain: value for (domain,), value in self["qmpvcpu_up"].items()}


def rendered(registry: CollectorRegistry) -> Page:
    """What *registry* has now."""
    return Page.of(generate_latest(registry).decode())


@dataclass
class Exporter:
    """An exporter that runs."""

    running: Running
    url: str

    @property
    def host(self) -> str:
        return self.url.split("/")[2].rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.url.split("/")[2].rpartition(":")[2])

    async def scrape(self) -> Page:
        """Return what it says now."""
        return await asyncio.to_thread(self._scrape)

    def _scrape(self) -> Page:
        with urllib.request.urlopen(self.url, timeout=_DEADLINE) as response:  # noqa: S310 - it is http
            return Page.of(response.read().decode())

    def connect(self) -> socket.socket:
        """Return a new connection."""
        return socket.create_connection((self.host, self.port), timeout=_DEADLINE)

    async def ask(self, request: bytes) -> bytes:
        """Send *request* and return the whole answer."""
        return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: bytes) -> bytes:
        with self.connect() as client:
            with contextlib.suppress(OSError):  # it may have answered before all of it was sent
                client.sendall(request)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while more := client.recv(65536):
                    answer += more
            return answer


@contextlib.asynccontextmanager
async def exporting(*arguments: str | Path, listen: str = "127.0.0.1:0") -> AsyncIterator[Exporter]:
    """Start ``qmpvcpu exporter`` at a free port; it ends as it should, unless it has ended already."""
    async with running("exporter", "--listen", listen, "--rescan", "0.1", *arguments) as it:
        assert it.process.stdout is not None
        async with asyncio.timeout(_DEADLINE):
            said = (await it.process.stdout.readline()).decode()
        if "http://" not in said:
            raise AssertionError(await it.end())
        yield Exporter(it, said.split()[-1])
        if it.process.returncode is None:
            it.process.send_signal(signal.SIGTERM)
            assert (await it.end()).code == 0
