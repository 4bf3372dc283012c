"""The rows as people read them: on the terminal, and in docs/performance.md."""

import re
from collections.abc import Iterator, Sequence

from rich.table import Table

from tests.bench.row import BARE, EACH_VM, KEPT, LIBVIRT, OURS, OVER_NATS, RAW, RECORDED, SSH, VIRSH, Goal, Row

__all__ = ["goal_lines", "goals_table", "hosts_beside", "hosts_growth", "main_table", "markdown", "terminal"]

# What most ask first: the work, and on what, of the newest QEMU.
MAIN = (
    ("plug one", "16 slots"),
    ("plug one, acknowledged", "16 slots"),
    ("unplug one, proven", "16 slots"),
    ("plug one, recorded", "8 slots"),
    ("plug 1 -> 8", "8 slots"),
    ("unplug 8 -> 1, CONTINUE", "8 slots"),
    ("unplug 8 -> 1, STOP", "8 slots"),
    ("plug 1 -> 240", "240 slots"),
    ("unplug 240 -> 1, CONTINUE", "240 slots"),
    ("unplug 240 -> 1, STOP", "240 slots"),
    ("read again", "240 slots"),
    ("look at what is known", "240 slots"),
    ("XML", "240 slots"),
    ("statistics", "64 slots"),
    ("attach and list", "100 VMs"),
    ("list again", "100 VMs"),
    ("plug one each", "100 VMs"),
    ("unplug one each", "100 VMs"),
    ("memory of one VM", "8 slots"),
    ("command list, CPU time", "8 slots"),
    ("command plug, CPU time", "8 slots"),
)


def terminal(rows: Sequence[Row]) -> Table:
    """Return all of it, for a terminal."""
    columns = ("work", "on", "who", "median", "min", "max", "/ raw", "/ libvirt", "/ virsh")
    table = Table(*columns, title="qmpvcpu beside raw QMP and libvirt")
    for row in rows:
        for number, (who, *numbers) in enumerate(_lines(row)):
            table.add_row(
                f"{row.work}, {row.unit}" if not number else "", row.setting if not number else "", who, *numbers
            )
        table.add_section()
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Return all of it, for docs/performance.md."""
    lines: list[str] = []
    setting = None
    settings = list(dict.fromkeys(row.setting for row in rows))
    for row in sorted(rows, key=lambda row: settings.index(row.setting)):
        if row.setting != setting:
            setting = row.setting
            lines += ["", f"### {setting}", "", "| work | who | median | min | max | / raw | / libvirt | / virsh |"]
            lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for number, cells in enumerate(_lines(row)):
            lines.append("| " + " | ".join(("" if number else f"{row.work}, {row.unit}", *cells)) + " |")
    works: dict[str, str] = {}
    for row in rows:
        works.setdefault(_kind(row.work), row.reads)
    lines += ["", "What each row measures:", "", *(f"- **{work}**: {reads}." for work, reads in works.items())]
    return "\n".join(lines).strip()


def main_table(rows: Sequence[Row]) -> str:
    """Return what most ask first, for docs/performance.md."""
    lines = [
        "| work | on | raw | qmpvcpu | / raw | libvirt | libvirt / qmpvcpu |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for work, on in MAIN:
        found = [row for row in rows if row.work == work and row.setting.endswith(on)]
        if not found:  # without libvirt, or KVM
            continue
        row = max(found, key=lambda row: row.rank)
        ours = RECORDED if "recorded" in work else OURS
        theirs = next((who for who in (LIBVIRT, VIRSH) if who in row.samples), None)
        for least in [who for who in row.samples if who.startswith("raw") or who == BARE] or [OURS]:
            cells = [
                work.replace("->", "→") + least.removeprefix(RAW).removesuffix(BARE).removesuffix(OURS),
                row.setting,
                _quantity(row, least) if least != OURS else "",
                f"**{_quantity(row, ours)}**",
                f"{row.ratio(ours, least):.2f}x" if least != OURS else "",
                _quantity(row, theirs) if theirs else "",
                _times(row.median(theirs) / row.median(ours)) if theirs else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def hosts_growth(rows: Sequence[Row]) -> str:
    """Return how the cost of a VM grows with the number of hosts, for docs/performance.md."""
    found = [row for row in rows if row.setting == EACH_VM]
    sizes = list(found[0].samples) if found else []
    lines = [f"| each VM | {' | '.join(sizes)} | growth |", f"| --- |{' ---: |' * (len(sizes) + 1)}"]
    for row in found:
        growth = f"{row.ratio(sizes[-1], sizes[0]):.2f}x"
        cells = [row.work.removesuffix(", each VM"), *(_quantity(row, size) for size in sizes), growth]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def hosts_beside(rows: Sequence[Row]) -> str:
    """Return what the same takes with one ssh per host, for docs/performance.md."""
    lines = [f"| work | on | {SSH} | {KEPT} | {OVER_NATS} |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        if SSH in row.samples:
            taken = [_quantity(row, who) if who in row.samples else "" for who in (SSH, KEPT, OVER_NATS)]
            lines.append(f"| {' | '.join((row.work, row.setting, *taken))} |")
    return "\n".join(lines)


def _quantity(row: Row, who: str) -> str:
    return f"{_number(row.median(who))} {row.unit}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.2g}x"


def goal_lines(rows: Sequence[Row]) -> list[str]:
    """Return each target with what was measured, as rows of a table: met, or missed."""
    lines = []
    for row in rows:
        for goal in row.goals:
            judged = row.judge(goal)
            if judged is not None:
                value, met = judged
                bound, shown = _bound(goal, row, value)
                lines.append(f"| {row.work} | {row.setting} | {bound} | {shown} | {'met' if met else '**missed**'} |")
    return lines


def goals_table(rows: Sequence[Row]) -> str:
    """Return all targets, for docs/performance.md."""
    return "\n".join(["| work | on | target | measured | |", "| --- | --- | --- | --- | --- |", *goal_lines(rows)])


def _bound(goal: Goal, row: Row, value: float) -> tuple[str, str]:
    if goal.over is None:
        return f"{goal.who} ≤ {goal.at_most:g} {row.unit}", f"{value:.1f} {row.unit}"
    if goal.above:
        return f"{goal.who} ≤ {goal.over} + {goal.at_most:g} {row.unit}", f"{value:+.1f} {row.unit}"
    if goal.over == LIBVIRT:
        return f"{goal.over} ≥ {1 / goal.at_most:g}x {goal.who}", f"{1 / value:.2f}x"
    return f"{goal.who} ≤ {goal.at_most:g}x {goal.over}", f"{value:.2f}x"


def _lines(row: Row) -> Iterator[tuple[str, ...]]:
    first = next(iter(row.samples))
    for who, samples in row.samples.items():
        numbers = (row.median(who), min(samples), max(samples))
        ratios = [row.ratio(who, base) if who != base else None for base in (first, LIBVIRT, VIRSH)]
        yield (who, *map(_number, numbers), *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))


def _number(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2g}"
        if value < 0.1
        else f"{value:.2f}"
    )


def _kind(work: str) -> str:
    """Return *work* without its numbers: rows of several sizes measure the same."""
    for verb in ("plug 1 ->", "unplug"):
        if work.startswith(verb) and "->" in work:
            return "plug 1 -> N" if verb == "plug 1 ->" else re.sub(r"\d+ ->", "N ->", work)
    return work
