"""Floor 7: the command line, extra ``cli``.

Rule of this floor: parsing and printing only. What a command does is one call of the library; this floor decides
nothing about a VM, and turns every outcome into words for people, one JSON document for programs, and an exit code.
"""

import atexit
import gc
import sys
from collections.abc import Sequence

from qmpvcpu.cli.streams import cannot_print, complain, encode_all, open_missing

_EXTRA = ("typer", "rich")
# Importing makes far more objects than these, and no garbage: looking for it takes a fifth of a short command's time.
_MANY_OBJECTS = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Exit codes: 0 reached; 1 refused, rejected, pending or partial; 2 bad usage or input, denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or SIGTERM.

    Args:
        arguments: The words after the program's name; None: those of this process.

    Returns:
        The exit code, for ``sys.exit``.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    open_missing()
    encode_all()
    if arguments is None:
        gc.set_threshold(_MANY_OBJECTS)
        atexit.register(gc.freeze)  # and none is looked for at the end, when all goes anyway
    try:
        return _run(words)
    except KeyboardInterrupt:  # while the imports ran, or when all is said: in between it is waited for
        return 130


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        return _say_version()
    try:
        if "list" in words and "--json" in words:
            from qmpvcpu.cli import quick

            if (address := quick.address_of(words)) is not None:
                return quick.list_json(address)
        # Not at the top: without the extra, an import error here would be a traceback instead of a sentence.
        from qmpvcpu.cli.app import run

        return run(words)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        return _without_extra(words, missing)


def _say_version() -> int:
    from importlib.metadata import version

    try:
        print(f"qmpvcpu {version('qmpvcpu')}", flush=True)
    except OSError as error:
        return cannot_print(error)
    return 0


def _without_extra(words: list[str], missing: str) -> int:
    """Play the demo, which needs no more than the package itself; of all else say what it needs."""
    if words == ["demo"]:
        from qmpvcpu.cli.plain import play

        return play()
    complain(f"qmpvcpu: the command line needs {missing}, which is not installed: pip install 'qmpvcpu[cli]'")
    return 2
