"""A real Prometheus and its own checks: names, rules, and every query of the dashboard, beside live VMs."""

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import run
from tests.docs.blocks import ROOT, block
from tests.fleet.vms import guests, stopped
from tests.metrics.prometheus import Prometheus, program, prometheus
from tests.metrics.scraping import exporting
from tests.waiting import until

pytestmark = pytest.mark.qemu

DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs" / "grafana" / "qmpvcpu.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
# Only KVM tells these.
OF_KVM = ("qmpvcpu_vcpu_kvm_exits_total", "qmpvcpu_vcpu_halted")


def filled(expression: str) -> str:
    """The query as Grafana would send it for all VMs."""
    for name, value in (("$__rate_interval", "5s"), ("$__range", "1m"), ("$domain", ".*")):
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


async def change_vcpus(refuses: MicroGuest, hangs: MicroGuest, other: MicroGuest) -> None:
    """Have something of everything happen: a plug, a removal, a refusal, and a removal that stays pending."""
    for number in range(3):
        assert (await run("set", f"0-{number + 1}", "--qmp", other.sockets[1])).code == 0
        await asyncio.sleep(0.6)  # Prometheus sees an increase between two scrapes
        await refuses.refuse(0x82)
        assert (await run("unplug", "1", "--qmp", refuses.sockets[1])).code == 1
    if other.accelerator == "kvm":  # not every QEMU under TCG survives it
        assert (await run("unplug", "3", "--qmp", other.sockets[1])).code == 0
    await hangs.set_behaviour(Behaviour.hanging())
    assert (await run("unplug", "1", "--timeout", "0", "--qmp", hangs.sockets[1])).code == 1


async def unanswered(server: Prometheus, *, kvm: bool) -> list[str]:
    """The titles of the panels that show nothing, or nothing but NaN."""
    empty = []
    for title, expression in QUERIES:
        if not kvm and any(name in expression for name in OF_KVM):
            continue
        values = [float(each["value"][1]) for each in await server.query(filled(expression))]
        if not any(value == value for value in values):  # noqa: PLR0124 - NaN is not
            empty.append(title)
    return empty


async def test_every_query_of_the_dashboard_has_data_of_live_vms(tmp_path: Path) -> None:
    directory = tmp_path / "vms"
    directory.mkdir()
    async with (
        guests(3, boot=2) as (refuses, hangs, other),
        exporting("--dir", directory) as exporter,
    ):
        for name, vm in (("refuses", refuses), ("hangs", hangs), ("other", other)):
            (directory / f"{name}.qmp").symlink_to(vm.qmp)
        config = block("docs/metrics.md", "Prometheus scrapes it").text.replace("9177", str(exporter.port))
        async with prometheus(tmp_path, config, block("docs/metrics.md", "alerts").text) as server:
            await until(lambda: server.has("count(qmpvcpu_up == 1) == 3"), 20)
            kvm = other.accelerator == "kvm"

            async def all_have_data() -> bool:
                return await unanswered(server, kvm=kvm) == []

            changing = asyncio.create_task(change_vcpus(refuses, hangs, other))
            try:
                await until(all_have_data, 40)
            except TimeoutError:
                pytest.fail(f"no data: {await unanswered(server, kvm=kvm)}")
            await changing
            variable = DASHBOARD["templating"]["list"][1]["query"]
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable).groups()  # type: ignore[union-attr]
            values = await server.ask(f"label/{label}/values", **{"match[]": metric})
            assert values == ["hangs", "other", "refuses"]
            with stopped(other):
                await until(lambda: server.has('ALERTS{alertname="VmDoesNotAnswer"}'), 20)
            for group in (await server.ask("rules"))["groups"]:
                assert [rule["lastError"] for rule in group["rules"] if rule["health"] != "ok"] == []


async def test_prometheus_has_nothing_against_the_names_and_the_rules(tmp_path: Path) -> None:
    directory = tmp_path / "vms"
    directory.mkdir()
    async with MicroGuest() as guest, exporting("--dir", directory) as exporter:
        (directory / "vm.qmp").symlink_to(guest.qmp)

        async def is_up() -> bool:
            return (await exporter.scrape()).up == {"vm": 1}

        await until(is_up, 15)
        page = (await exporter.scrape()).text
    checked = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
        [program("promtool"), "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    rules = tmp_path / "alerts.yml"
    rules.write_text(block("docs/metrics.md", "alerts").text)
    subprocess.run([program("promtool"), "check", "rules", rules], check=True, capture_output=True)  # noqa: ASYNC221


def test_every_metric_of_a_query_is_one_that_there_is() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    names = {
        name for _, expression in QUERIES for name in re.findall(r"\b(?:libvirt|qmpvcpu|process)_\w+", expression)
    }
    assert [name for name in sorted(names) if f"`{name.removesuffix('_bucket')}`" not in text] == []


def test_panels_have_places_and_numbers_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
