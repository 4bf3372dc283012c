"""The picture of a run: how much longer than raw QMP, and what becomes of it as VMs and slots grow in number."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from tests.bench.row import LIBVIRT, OURS, RAW, RECORDED, Row
from tests.bench.svg import DARK, GREY, PLAIN, Series, chart, document, line, rect, text

__all__ = ["svg"]

COLOURS = {OURS: "#2b6cb0", RECORDED: "#90cdf4", LIBVIRT: "#dd6b20"}
BARS = ("plug one", "unplug one, proven", "plug 1 -> ", "unplug ", "read again")  # how their works begin
VMS = {"attach and list": "attach", "list again": "read"}
LAYOUTS = {"parse, each slot": "#718096", "plan, each slot": "#2b6cb0", "render, each slot": "#2f855a"}
MARGIN, LEFT, WIDTH, BAR, GAP = 16, 190, 960, 12, 8
LOW, HIGH = 0.8, 16.0
TICKS = (1, 2, 4, 8, 16)
LINE = 150  # characters


def svg(rows: Sequence[Row], machine: str) -> str:
    """Return the picture of *rows*."""
    parts = [text((MARGIN, 26), "qmpvcpu beside raw QMP and libvirt", size=17)]
    y = 30.0
    for words in _folded(machine):
        y += 14
        parts.append(text((MARGIN, y), words, size=10, colour=PLAIN))
    bars, y = _bars(rows, y + 30)
    y += 270
    half = WIDTH / 2
    vms = ("Many VMs on one loop", "VMs", "ms for each VM: level, if each costs the same")
    parts += chart((MARGIN + 40, y), half - 230, vms, _vms(rows))
    layouts = ("Large layouts", "slots", "ms for all slots: straight, if it is linear")
    parts += chart((MARGIN + 40 + half, y), half - 230, layouts, _layouts(rows))
    return document([*parts, *bars], WIDTH, y + 48)


def _folded(machine: str) -> list[str]:
    """Return *machine* in lines that fit."""
    lines = [""]
    for part in machine.replace("; ", ", ").split(", "):
        if len(lines[-1]) + len(part) > LINE:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + part
    return lines


def _bars(rows: Sequence[Row], y: float) -> tuple[list[str], float]:
    """Return a bar for each who did the work of a row, and where they end."""
    parts = [text((MARGIN, y), "Time over that of raw QMP", size=13)]
    for number, (who, colour) in enumerate(COLOURS.items()):
        x = LEFT + 40 + 135 * number
        parts += [rect((x, y - 9), 10, 10, colour), text((x + 14, y), who)]
    parts.append(text((WIDTH - MARGIN, y), "the dark line is raw QMP; logarithmic", anchor="end", size=10))
    top = y = y + 8
    shown: list[str] = []
    for group, members in _groups(rows).items():
        shown.append(text((MARGIN, y + 14), group, colour=PLAIN))
        y += 20
        for row in members:
            bars = [(who, ratio) for who in COLOURS if (ratio := row.ratio(who, RAW)) is not None]
            name = f"{row.work}, {_slots(row)}" if row.work == "read again" else row.work
            shown.append(text((LEFT - 8, y + len(bars) * BAR / 2 + 4), name.replace("->", "→"), anchor="end"))
            for who, ratio in bars:
                shown += _bar(who, ratio, y)
                y += BAR
            y += GAP
    for tick in TICKS:
        parts.append(line((_x(tick), top), (_x(tick), y), DARK if tick == 1 else GREY))
        parts.append(text((_x(tick), y + 13), f"{tick}x", anchor="middle", size=10))
    return parts + shown, y + 13


def _bar(who: str, ratio: float, y: float) -> list[str]:
    start, end = sorted((_x(1.0), _x(ratio)))
    shape = rect((start, y), max(end - start, 1), BAR - 1, COLOURS[who], title=f"{who}: {ratio:.2f}x raw")
    if ratio > HIGH:  # its end is outside, and so its number inside
        return [shape, text((end - 6, y + BAR - 3), f"{ratio:,.0f}x →", size=9, anchor="end", colour="#ffffff")]
    return [shape, text((max(end, _x(1.0)) + 4, y + BAR - 3), f"{ratio:.2f}x", size=9)]


def _x(ratio: float) -> float:
    right = WIDTH - MARGIN - 40
    return LEFT + (right - LEFT) * math.log(min(max(ratio, LOW), HIGH) / LOW) / math.log(HIGH / LOW)


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of one VM that have raw in them, by accelerator, KVM first; of the newest QEMU alone."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.work.startswith(BARS) and RAW in row.samples and _slots(row) and "recorded" not in row.work:
            groups[row.setting.rpartition(", ")[0]].append(row)
    newest = {group.partition(",")[0]: group for group in sorted(groups, key=lambda group: groups[group][0].rank)}
    return {group: groups[group] for group in sorted(newest.values())}


def _slots(row: Row) -> str:
    """Return how many slots the row's one VM has, in words; "" if it is not about one VM."""
    last = row.setting.rpartition(", ")[2]
    return last if last.endswith(" slots") else ""


def _vms(rows: Sequence[Row]) -> list[Series]:
    """Return what each of some VMs takes to attach, and to be read again, by who does it."""
    found: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        size = re.search(r"(\d+) VMs?$", row.setting)
        for who in row.samples if size and row.work in VMS else ():
            found[VMS[row.work], who].append((int(size[1]), row.median(who) / int(size[1])) if size else (0, 0))
    return [
        Series(f"{work}, {who.removesuffix(' queries')}", COLOURS.get(who, DARK if who == RAW else "#a0aec0"), points)
        for (work, who), points in found.items()
    ]


def _layouts(rows: Sequence[Row]) -> list[Series]:
    """Return what all slots of a layout take, by what is done to them."""
    found = []
    for row in rows:
        if row.work in LAYOUTS:
            sizes = {who: int(who.removesuffix(" slots").replace(",", "")) for who in row.samples}
            points = [(size, row.median(who) * size / 1000) for who, size in sizes.items()]
            found.append(Series(row.work.partition(",")[0], LAYOUTS[row.work], [(0, 0), *points]))
    return found
