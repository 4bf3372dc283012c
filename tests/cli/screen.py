"""A terminal's screen: what is on it after everything that a program wrote."""

from typing import Any

import pyte
from rich.style import Style
from rich.text import Text

__all__ = ["Screen"]

_COLOURS = {"brown": "yellow", "brightbrown": "bright_yellow", "default": None}
_FAINT, _GREY = 2, 90


class _WithFaint(pyte.Screen):
    """The screen, with grey for faint letters, which pyte does not know."""

    def select_graphic_rendition(self, *attributes: int, **more: Any) -> None:
        super().select_graphic_rendition(*(_GREY if each == _FAINT else each for each in attributes), **more)


class Screen:
    """What a terminal of *columns* times *rows* shows."""

    def __init__(self, columns: int, rows: int) -> None:
        self._screen = _WithFaint(columns, rows)
        self._stream = pyte.ByteStream(self._screen)

    def feed(self, said: bytes) -> None:
        """Take in what the program wrote."""
        self._stream.feed(said)

    @property
    def lines(self) -> list[str]:
        """All lines down to the last that is not empty, as text."""
        lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def coloured(self) -> list[Text]:
        """The same lines with their colours."""
        return [self._coloured(row, len(line)) for row, line in enumerate(self.lines)]

    def _coloured(self, row: int, length: int) -> Text:
        text = Text()
        for column in range(length):
            char = self._screen.buffer[row][column]
            colour = _COLOURS.get(char.fg, char.fg.replace("bright", "bright_"))
            text.append(char.data, Style(color=colour, bold=char.bold or None, reverse=char.reverse or None))
        return text
