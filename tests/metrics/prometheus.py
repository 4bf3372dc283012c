"""A Prometheus of our own, Debian's, that scrapes an exporter."""

import asyncio
import contextlib
import json
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qmpvcpu.testing.qemu import cache_directory
from tests.waiting import until

_DEADLINE = 20.0


def program(name: str) -> Path:
    """Return the path of one of Prometheus' programs, as fixtures/install.sh has unpacked it, or in PATH."""
    unpacked = cache_directory() / "prometheus" / "usr" / "bin" / name
    found = str(unpacked) if unpacked.exists() else shutil.which(name)
    if found is None:
        pytest.skip("no Prometheus here: fixtures/install.sh tests unpacks Debian's")
    return Path(found)


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what an instant query gives."""
        return (await self.ask("query", query=expression))["result"]  # type: ignore[no-any-return]

    async def ask(self, what: str, **parameters: str) -> Any:
        """Return the data that the API gives."""
        return await asyncio.to_thread(self._ask, f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}")

    def _ask(self, url: str) -> Any:
        with urllib.request.urlopen(url, timeout=_DEADLINE) as response:  # noqa: S310 - it is http
            answer = json.load(response)
        assert answer["status"] == "success"
        return answer["data"]

    async def has(self, expression: str) -> bool:
        """Whether an instant query gives anything."""
        try:
            return bool(await self.query(expression))
        except OSError:  # it is starting
            return False


@contextlib.asynccontextmanager
async def prometheus(directory: Path, config: str, rules: str, every: str = "250ms") -> AsyncIterator[Prometheus]:
    """Start a Prometheus with this configuration, and these rules, that scrapes and evaluates so often."""
    content = yaml.safe_load(config)
    content["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    content["rule_files"] = ["alerts.yml"]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(content))
    (directory / "alerts.yml").write_text(rules)
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        program("prometheus"),
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={listen}",
        "--log.level=error",
    )
    server = Prometheus(f"http://{listen}")
    try:
        await until(lambda: server.has('up{job="qmpvcpu"} == 1'), _DEADLINE)
        yield server
    finally:
        process.kill()
        await process.wait()
