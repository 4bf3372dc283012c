"""Completion in bash, zsh and fish: of commands and options by click, of vCPU ids by a look at the VM.

Shells evaluate what they are offered (zsh twice), and QEMU's properties come from outside: only numbers, and names of
small letters and dashes, are passed on.
"""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from qmpvcpu.cli.app import COMPLETE_VARIABLE
from qmpvcpu.cli.result import BadUsageError
from qmpvcpu.errors import QmpVcpuError

if TYPE_CHECKING:
    from qmpvcpu.model.layout import Layout, Vcpu

# Where each shell has its completions, what it reads as it starts, and the lines that this needs.
_FILES: Final[Mapping[str, tuple[str, str, Sequence[str]]]] = {
    "bash": (".bash_completions/qmpvcpu.sh", ".bashrc", ["source ~/.bash_completions/qmpvcpu.sh"]),
    "zsh": (".zfunc/_qmpvcpu", ".zshrc", ["fpath+=~/.zfunc", "autoload -Uz compinit; compinit"]),
    "fish": (".config/fish/completions/qmpvcpu.fish", "", ()),
}
# Nobody who presses a key waits for a VM whose socket is held by another client.
_PATIENCE_S: Final = 0.5
_NAME: Final = re.compile(r"[a-z-]+")


def answer(program: click.Command, instruction: str) -> int:
    """Tell a shell what completes, and return the exit code."""
    return shell_complete(program, {}, "qmpvcpu", COMPLETE_VARIABLE, instruction)


def script(shell: str) -> str:
    """Return what *shell* must evaluate to complete our words; "": the shell that runs us.

    Raises:
        BadUsageError: It is none that we know.
    """
    shell = _known(shell)
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - JUSTIFICATION: click knows these three
    return kind(click.Command("qmpvcpu"), {}, "qmpvcpu", COMPLETE_VARIABLE).source().strip()


def install(shell: str) -> str:
    """Set completion up for *shell* ("": the shell that runs us), for this user, and return what was done.

    Raises:
        BadUsageError: It is none that we know, or its files cannot be written.
    """
    shell = _known(shell)
    path, startup, lines = _FILES[shell]
    try:
        home = Path.home()
        written = home / path
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(f"{script(shell)}\n", encoding="utf-8")
        if startup:
            _append(home / startup, lines)
    except (OSError, RuntimeError) as error:
        raise BadUsageError(f"completion cannot be set up: {error}") from error
    return f"{shell} completes qmpvcpu from its next start on: {written}"


def _append(path: Path, lines: Sequence[str]) -> None:
    """Add *lines* to the file at *path*, but those that are there."""
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        there = file.read()
        missing = [line for line in lines if line not in there.splitlines()]
        apart = "\n" if there and not there.endswith("\n") else ""
        file.write(apart + "".join(f"{line}\n" for line in missing))


def _known(shell: str) -> str:
    shell = shell or _of_parent() or Path(os.environ.get("SHELL", "")).name
    if shell not in _FILES:
        raise BadUsageError(f"which shell? Name one of {', '.join(_FILES)}")
    return shell


def _of_parent() -> str:
    """Return the name of the program that runs us if it is a shell that we know, or ""."""
    from qmpvcpu.host.processes import read_stat  # not at the top: most words complete without it

    parent = read_stat(os.getppid())
    return parent.name if parent is not None and parent.name in _FILES else ""


def offered_ids(context: click.Context, incomplete: str, fits: "Callable[[Vcpu], bool]") -> list[CompletionItem]:
    """Return the vCPU ids that begin with *incomplete*, each with its place, of the vCPUs that *fits* is true of."""
    named = (given.params.get("qmp") for given in _with_parents(context))
    address = next((each for each in named if each), os.environ.get("QMPVCPU_QMP"))
    if not address:
        return []
    from qmpvcpu.qmp.queries import look  # not at the top: most words complete without a VM

    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    try:
        layout = asyncio.run(look(address, reply_timeout=_PATIENCE_S))
    except QmpVcpuError:
        return []
    return [CompletionItem(word, help=place) for word, place in words(layout, fits) if word.startswith(incomplete)]


def _with_parents(context: click.Context | None) -> Iterator[click.Context]:
    while context is not None:
        yield context
        context = context.parent


def is_free(vcpu: "Vcpu") -> bool:
    """Tell whether it can be plugged."""
    return not vcpu.enabled


def is_plugged(vcpu: "Vcpu") -> bool:
    """Tell whether it is plugged."""
    return vcpu.enabled


def can_leave(vcpu: "Vcpu") -> bool:
    """Tell whether it can be unplugged."""
    return vcpu.hotpluggable


def words(layout: "Layout", fits: "Callable[[Vcpu], bool]") -> Iterator[tuple[str, str]]:
    """Return the first id of every slot whose vCPU *fits*, with its place in the machine."""
    for slot in layout.slots:
        if fits(layout[slot.first]):
            yield str(slot.first), _place(slot.props)


def _place(props: Mapping[str, Any]) -> str:
    """Return where a slot is, in words that no shell reads as anything but words."""
    return " ".join(
        f"{name.removesuffix('-id')} {value}"
        for name, value in props.items()
        if _NAME.fullmatch(name) and type(value) is int
    )
