"""What is kept of a run: JSON, the picture, and the tables in docs/performance.md."""

import json
import os
import platform
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench.plot import svg
from tests.bench.row import Goal, Row
from tests.bench.setting import Setting
from tests.bench.table import goals_table, hosts_beside, hosts_growth, main_table, markdown

__all__ = ["machine", "merge", "publish", "redraw"]

DOCS = Path(__file__).parents[2] / "docs"


def machine(setting: Setting) -> str:
    """Name the machine, and what ran on it."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    qemus = " and ".join(setting.qemus)
    libvirt = ""
    if setting.libvirt is not None:
        libvirt = ", libvirt " + setting.libvirt.virsh("--version").strip()
    system = _pretty_name()
    return (
        f"{os.cpu_count()} x {model}, Linux {platform.release().split('-')[0]}, {system}, Python"
        f" {platform.python_version()}, QEMU {qemus}{libvirt}, {'KVM and TCG' if setting.kvm else 'TCG'};"
        f" {datetime.now(UTC):%Y-%m-%d}; load {os.getloadavg()[0]:.1f} at its end, {_commit()}"
    )


def publish(rows: Sequence[Row], on: str, seconds: float) -> None:
    """Write docs/performance.json, docs/performance.svg and the measured parts of docs/performance.md."""
    _write({"machine": on, "seconds": round(seconds), "later": {}, "rows": [*map(_content, rows)]})


def merge(rows: Sequence[Row], parts: Collection[str], on: str) -> None:
    """Write the same with *rows*, of *parts* of the bench, in place of those that are there, or after them."""
    document = json.loads((DOCS / "performance.json").read_text())
    measured = {(row.work, row.setting): _content(row) for row in rows}
    kept = [measured.pop((row["work"], row["setting"]), row) for row in document["rows"]]
    later = {**document.get("later", {}), **dict.fromkeys(parts, on)}
    _write({**document, "later": later, "rows": [*kept, *measured.values()]})


def _content(row: Row) -> dict[str, Any]:
    samples = {who: [float(f"{each:.4g}") for each in taken] for who, taken in row.samples.items()}
    return {**asdict(row), "samples": samples}


def _write(document: dict[str, Any]) -> None:
    (DOCS / "performance.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    redraw()


def redraw() -> None:
    """Write the picture and the tables of what docs/performance.json has."""
    document = json.loads((DOCS / "performance.json").read_text())
    rows = [Row(**{**row, "goals": tuple(Goal(**goal) for goal in row["goals"])}) for row in document["rows"]]
    on = document["machine"]
    (DOCS / "performance.svg").write_text(svg(rows, on))
    page = (DOCS / "performance.md").read_text()
    machine_line = f"Measured on {on}. The whole run took {document['seconds']} s."
    for part, later in document.get("later", {}).items():
        machine_line += f"\nThe part `{part}` was measured later, on {later}."
    for name, content in (
        ("main", f"{machine_line}\n\n{main_table(rows)}"),
        ("targets", goals_table(rows)),
        ("hosts", f"{hosts_growth(rows)}\n\n{hosts_beside(rows)}"),
        ("all", markdown(rows)),
    ):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}"
    (DOCS / "performance.md").write_text(page)


def _pretty_name() -> str:
    told = Path("/etc/os-release").read_text().splitlines()
    return next((line.partition("=")[2].strip('"') for line in told if line.startswith("PRETTY_NAME=")), "Linux")


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=DOCS, capture_output=True, text=True, check=False
    )
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "no commit"
