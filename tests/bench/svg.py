"""The few shapes that the picture is made of.

Written by hand: some lines of text are the whole format, where a plotting library is 60 MB to install, and its output
changes from version to version.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

__all__ = ["DARK", "GREY", "PLAIN", "Series", "chart", "document", "line", "rect", "text"]

GREY, DARK, PLAIN = "#dddddd", "#444444", "#666666"
HEIGHT = 180  # of a chart's area
NAME = 13  # from one name to the next below it

Point = tuple[float, float]


def document(parts: Sequence[str], width: float, height: float) -> str:
    """Return the whole picture, on white."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, rect((0, 0), width, height, "#ffffff"), *parts, "</svg>", ""])


def text(at: Point, words: str, *, anchor: str = "start", size: int = 11, colour: str = "#222222") -> str:
    """Return *words* on a base line."""
    shape = f'x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {shape}>{escape(words)}</text>"


def rect(at: Point, width: float, height: float, colour: str, *, title: str = "") -> str:
    """Return a filled rectangle; *title* is shown where the mouse rests on it."""
    shape = f'x="{at[0]:.1f}" y="{at[1]:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"'
    return f"<rect {shape}><title>{escape(title)}</title></rect>" if title else f"<rect {shape}/>"


def line(start: Point, end: Point, colour: str = GREY, width: float = 1) -> str:
    """Return a straight line."""
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Said at its end, with the last value.
        colour: Its colour.
        points: What it joins, by ascending x.
    """

    name: str
    colour: str
    points: Sequence[Point]


def chart(at: Point, width: float, words: tuple[str, str, str], series: Sequence[Series]) -> list[str]:
    """Return lines over two axes that begin at 0.

    Args:
        at: Left end of the lower axis.
        width: Length of it; names are to its right.
        words: The title, what the lower axis is, and what the other is.
        series: The lines.
    """
    left, bottom = at
    title, along, upwards = words
    points = [point for each in series for point in each.points]
    most, high = max(x for x, _ in points), _round_up(max(y for _, y in points))

    def place(x: float, y: float) -> Point:
        return left + width * x / most, bottom - HEIGHT * y / high

    parts = [
        text((left - 40, bottom - HEIGHT - 34), title, size=13),
        text((left - 40, bottom - HEIGHT - 14), upwards),
    ]
    for quarter in range(5):
        value = high * quarter / 4
        parts.append(line(place(0, value), place(most, value), GREY if quarter else DARK))
        parts.append(text((left - 6, place(0, value)[1] + 4), f"{value:g}", anchor="end", size=10))
    for x in sorted({x for x, _ in points}):
        parts.append(line(place(x, 0), (place(x, 0)[0], bottom + 4), DARK))
        parts.append(text((place(x, 0)[0], bottom + 16), f"{x:,.0f}", anchor="middle", size=10))
    parts.append(text((left + width / 2, bottom + 32), along, anchor="middle"))
    free = 0.0  # names do not lie on each other
    for each in sorted(series, key=lambda each: -each.points[-1][1]):
        placed = [place(*point) for point in each.points]
        parts += [line(*ends, each.colour, 2) for ends in pairwise(placed)]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{each.colour}"/>' for x, y in placed]
        y = max(placed[-1][1] + 4, free)
        free = y + NAME
        parts.append(text((left + width + 8, y), f"{each.name}: {each.points[-1][1]:.3g}", colour=each.colour))
    return parts


def _round_up(value: float) -> float:
    """Return a number from *value* on of which a quarter is easy to read."""
    power = 1.0
    while power < value:
        power *= 10
    while power / 10 >= value:
        power /= 10
    return next(power * share for share in (0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.6, 0.8, 1) if power * share >= value)
