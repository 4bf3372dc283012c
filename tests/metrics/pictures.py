"""The picture of docs/metrics.md: what Prometheus' own graphs show of two VMs that share a host.

``python -m tests.metrics.pictures`` makes it anew in three minutes. One of two Linux guests works, then both, then
one gets two vCPUs more. It takes three packages of Debian's that the tests do without: prometheus (for its pages),
chromium and pngquant.
"""

import asyncio
import json
import socket
import tempfile
from pathlib import Path
from urllib.parse import urlencode

import qmpvcpu
from qmpvcpu.testing.linuxguest import LinuxGuest
from tests.docs.blocks import ROOT, block
from tests.metrics.prometheus import Prometheus, prometheus
from tests.metrics.scraping import exporting

PICTURE = ROOT / "docs" / "images" / "metrics.png"
_GRAPHS = (
    "sum by (domain) (rate(libvirt_domain_vcpu_time_seconds_total[10s]))",
    "sum by (domain) (rate(libvirt_domain_vcpu_delay_seconds_total[10s]))",
)
_TURN_S = 25
_BUSY = "i=0; while [ $i -lt {vcpus} ]; do timeout {seconds} sh -c 'while :; do :; done' & i=$((i + 1)); done"
_SIZE = "1000,1520"  # all of it: else Chromium scrolls
_COLOURS = "32"


async def work(guest: LinuxGuest, vcpus: int, seconds: float) -> None:
    """Keep so many vCPUs of *guest* busy for so long, through its agent."""
    arguments = {"path": "/bin/sh", "arg": ["-c", _BUSY.format(vcpus=vcpus, seconds=int(seconds))]}
    await asyncio.to_thread(_ask_agent, str(guest.agent), {"execute": "guest-exec", "arguments": arguments})


def _ask_agent(path: str, question: object) -> None:
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(path)
        agent.settimeout(10)
        agent.sendall(json.dumps(question).encode() + b"\n")
        assert b'"return"' in agent.recv(4096)


async def live(web: LinuxGuest, batch: LinuxGuest) -> None:
    """Have happen what the picture shows."""
    await asyncio.sleep(_TURN_S / 2)
    await work(web, 2, 4 * _TURN_S)
    await asyncio.sleep(_TURN_S)
    await work(batch, 2, 3 * _TURN_S)
    await asyncio.sleep(_TURN_S)
    async with qmpvcpu.attach(batch.sockets[1]) as vm:
        await vm.set_map("0-3")
    await work(batch, 2, _TURN_S)
    await asyncio.sleep(2.5 * _TURN_S)


async def shoot(server: Prometheus, seconds: float) -> None:
    """Have Chromium draw the graphs, and keep the picture with few colours."""
    graphs: dict[str, str] = {}
    for number, expression in enumerate(_GRAPHS):
        graphs |= {
            f"g{number}.{name}": value
            for name, value in (("expr", expression), ("tab", "0"), ("range_input", f"{int(seconds)}s"))
        }
    with tempfile.TemporaryDirectory() as directory:
        shot = Path(directory) / "shot.png"
        await _run(
            "chromium",
            *(
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={directory}/profile",
            ),
            *(f"--window-size={_SIZE}", "--virtual-time-budget=20000", f"--screenshot={shot}"),
            f"{server.url}/classic/graph?{urlencode(graphs)}",
        )
        await _run("pngquant", "--force", "--strip", "--speed", "1", "--output", str(PICTURE), _COLOURS, str(shot))


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0, command


async def _main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with (
            LinuxGuest(boot=2, extra_args=("-name", "web")) as web,
            LinuxGuest(boot=2, extra_args=("-name", "batch")) as batch,
            exporting("--qmp", web.qmp, "--qmp", batch.qmp) as exporter,
        ):
            config = block("docs/metrics.md", "Prometheus scrapes it").text.replace("9177", str(exporter.port))
            async with prometheus(directory, config, "groups: []", every="1s") as server:
                started = asyncio.get_running_loop().time()
                await live(web, batch)
                await shoot(server, asyncio.get_running_loop().time() - started)


if __name__ == "__main__":
    asyncio.run(_main())
