"""The picture of it: ratios as bars on a logarithmic scale, as SVG.

Written by hand: some lines of text are the whole format, where a plotting library is 60 MB to install, and its output
changes from version to version.
"""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from tests.bench.row import LIBVIRT, OURS, RAW, RECORDED, Row

__all__ = ["svg"]

SHOWN = (
    "plug one",
    "unplug one, proven",
    "plug 1 -> 8",
    "unplug 8 -> 1",
    "plug 1 -> 64",
    "unplug 64 -> 1",
    "plug 1 -> 240",
    "unplug 240 -> 1",
    "read again",
    "attach and list",
    "list again",
    "plug one each",
    "unplug one each",
)
COLOURS = {OURS: "#2b6cb0", RECORDED: "#90cdf4", LIBVIRT: "#dd6b20"}
LEFT, WIDTH, BAR, GAP = 330, 900, 11, 8
LOW, HIGH = 0.5, 64.0
TICKS = (0.5, 1, 2, 4, 8, 16, 32, 64)


def svg(rows: Sequence[Row], machine: str) -> str:
    """Return the medians over those of raw QMP, a bar for each who did the work too."""
    parts: list[str] = []
    y = 64.0
    for row in rows:
        bars = [(who, ratio) for who in COLOURS if (ratio := row.ratio(who, RAW)) is not None]
        if row.work not in SHOWN or not bars:
            continue
        middle = y + len(bars) * BAR / 2
        parts.append(_text(LEFT - 8, middle + 4, f"{row.work}  ({row.setting})", anchor="end"))
        for who, ratio in bars:
            start, end = sorted((_x(1.0), _x(ratio)))
            title = f"<title>{escape(f'{who}: {ratio:.2f}x raw')}</title>"
            parts.append(
                f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 1):.1f}" height="{BAR - 1}"'
                f' fill="{COLOURS[who]}">{title}</rect>'
            )
            parts.append(_text(max(end, _x(1.0)) + 4, y + BAR - 2, f"{ratio:.2f}", size=9))
            y += BAR
        y += GAP
    return _frame(parts, y, machine)


def _frame(parts: list[str], height: float, machine: str) -> str:
    lines = [_text(LEFT, 18, "Time over that of raw QMP (1 = the same; logarithmic)", size=14)]
    lines.append(_text(LEFT, 34, machine, size=10))
    for number, (who, colour) in enumerate(COLOURS.items()):
        x = LEFT + 150 * number
        lines.append(f'<rect x="{x}" y="42" width="10" height="10" fill="{colour}"/>')
        lines.append(_text(x + 14, 51, who))
    for tick in TICKS:
        colour = "#444" if tick == 1 else "#ddd"
        lines.append(f'<line x1="{_x(tick):.1f}" x2="{_x(tick):.1f}" y1="60" y2="{height:.1f}" stroke="{colour}"/>')
        lines.append(_text(_x(tick), height + 12, f"{tick:g}x", anchor="middle", size=10))
    size = f'width="{WIDTH + 40}" height="{height + 20:.0f}" viewBox="0 0 {WIDTH + 40} {height + 20:.0f}"'
    style = 'font-family="sans-serif" style="background:#fff"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *lines, *parts, "</svg>", ""])


def _x(ratio: float) -> float:
    bounded = min(max(ratio, LOW), HIGH)
    return LEFT + (WIDTH - LEFT) * math.log(bounded / LOW) / math.log(HIGH / LOW)


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
