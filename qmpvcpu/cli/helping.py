"""Help that fits the terminal, however narrow it is."""

import functools
import shutil
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

# click's own bounds: wider is hard to read, and below this it gives up to fit.
_WIDEST: Final = 80
_NARROW: Final = 60
# Below this words are cut to pieces, and textwrap ends with an error: the terminal wraps what is longer.
_NARROWEST: Final = 20
# Of a narrow terminal options stand on lines of their own, what they do below, indented by so much.
_INDENT: Final = 4


def help_width() -> int:
    """Return how wide help may be."""
    return max(min(shutil.get_terminal_size().columns, _WIDEST), _NARROWEST) - 2


def _narrowed(formatter: Any) -> Any:
    if formatter.width < _NARROW:
        formatter.write_dl = functools.partial(formatter.write_dl, col_max=_INDENT)
    return formatter


class _Command(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, _narrowed(formatter))


class _Group(TyperGroup):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, _narrowed(formatter))


def fit_help(app: typer.Typer) -> None:
    """Have the help of *app*, and of all that is registered with it, fit the terminal."""
    app.info.cls = _Group
    for command in app.registered_commands:
        command.cls = _Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            group.cls = _Group
            fit_help(group.typer_instance)
