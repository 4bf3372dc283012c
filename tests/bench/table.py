"""The rows as people read them: on the terminal, and in docs/performance.md."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from tests.bench.row import LIBVIRT, VIRSH, Goal, Row

__all__ = ["goal_lines", "markdown", "terminal"]


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
    for row in sorted(rows, key=lambda row: row.setting):
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


def _bound(goal: Goal, row: Row, value: float) -> tuple[str, str]:
    if goal.over is None:
        return f"{goal.who} ≤ {goal.at_most:g} {row.unit}", f"{value:.1f} {row.unit}"
    if goal.above:
        return f"{goal.who} ≤ {goal.over} + {goal.at_most:g} {row.unit}", f"+{value:.1f} {row.unit}"
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
            return "plug 1 -> N" if verb == "plug 1 ->" else "unplug N -> 1"
    return work
