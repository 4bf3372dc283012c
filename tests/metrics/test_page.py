"""The page on metrics: its blocks do what they say, and its tables have all metrics, with their labels."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector

import qmpvcpu
from qmpvcpu.metrics import VcpuCollector
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import environment
from tests.docs.blocks import ROOT, block
from tests.metrics.scraping import Page, rendered
from tests.waiting import until

pytestmark = pytest.mark.qemu


def told() -> dict[str, set[str]]:
    """The labels of each metric in the tables."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| `(libvirt_domain|qmpvcpu)_\w+` \|", line)]
    return {row[1].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}


async def test_all_metrics_are_told_with_their_labels() -> None:
    registry = CollectorRegistry()
    async with (
        MicroGuest(boot=2, behaviour=Behaviour.refusing(0x82)) as guest,
        qmpvcpu.attach(guest.qmp) as vm,
        VcpuCollector(vm, registry=registry) as collector,
    ):
        collector.observe(await vm.set_map("0-2"))
        with pytest.raises(qmpvcpu.UnplugRefusedError):
            await vm.unplug(1)
        await guest.set_behaviour(Behaviour.hanging())
        await vm.request_unplug(1)
        await collector.read()
        page = rendered(registry)
    tables = told()
    shown: dict[str, set[str]] = {}
    for name, labels in page.values:
        family = re.sub(r"_(bucket|count|sum|created)$", "", name)
        shown.setdefault(family, set()).update({label for label, _ in labels} - {"le"})
    where_it_can_be_had = {"libvirt_domain_vcpu_wait_seconds_total", *(name for name in tables if "kvm" in name)}
    where_it_can_be_had |= {"qmpvcpu_vcpu_halted"}
    of_the_exporter = {"qmpvcpu_scrape_duration_seconds", "qmpvcpu_build_info"}
    assert {name: labels for name, labels in shown.items() if name not in of_the_exporter} == {
        name: labels for name, labels in tables.items() if name in shown or name not in where_it_can_be_had
    }
    page_text = (ROOT / "docs" / "metrics.md").read_text()
    assert all(f"`{name}`" in page_text for name in of_the_exporter)


def test_what_is_told_of_the_process_is_there() -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    names = {name for name, _ in rendered(registry).values}
    assert set(re.findall(r"`(process_\w+)`", (ROOT / "docs" / "metrics.md").read_text())) <= names


async def test_the_commands_of_the_page_show_the_vm(tmp_path: Path) -> None:
    serve, look = block("docs/metrics.md", "a VM is seen from the shell").lines
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def shown() -> dict[str, float]:
        command = shlex.split(look.replace("9177", port))
        return Page.of(subprocess.run(command, capture_output=True, text=True, check=False).stdout).up

    async with MicroGuest() as guest:
        (tmp_path / "vm.qmp").symlink_to(guest.qmp)
        command = serve.removesuffix("&").replace("9177", port).replace("/run/vms", str(tmp_path))
        exporter = subprocess.Popen(  # noqa: ASYNC220 - it starts at once
            ["bash", "-c", f"exec {command}"], env=env, stdout=subprocess.DEVNULL
        )
        try:
            await until(lambda: shown() == {"vm": 1}, 15)
        finally:
            exporter.terminate()
            assert exporter.wait(10) == 0


async def test_a_vmm_serves_its_own_registry() -> None:
    module = block("docs/metrics.md", "a VMM serves its own registry").module()
    registry = CollectorRegistry()
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="vm") as vm:
        page = Page.of((await module.serve(vm, registry)).decode())
    assert page.value("qmpvcpu_vcpus_plugged", domain="vm") == 3
    assert page.value("qmpvcpu_transition_seconds_count", outcome="reached") == 1


def test_systemd_understands_the_service(tmp_path: Path) -> None:
    unit = block("docs/metrics.md", "a service").text.replace("/usr/local/bin/qmpvcpu", "/bin/true")
    path = tmp_path / "qmpvcpu-exporter.service"
    path.write_text(unit)
    assert shutil.which("systemd-analyze"), "Debian's libvirt brings it"
    ran = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False)
    assert [line for line in ran.stderr.splitlines() if path.name in line] == []
