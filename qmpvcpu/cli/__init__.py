"""Floor 9: the command line, extra ``cli``.

Rule of this floor: parsing and printing only. What a command does is one call of the library; this floor decides
nothing about a VM, and turns every outcome into words for people, one JSON document for programs, and an exit code.
"""

import atexit
import gc
import sys
from collections.abc import Sequence

import qmpvcpu
from qmpvcpu.cli.output import cannot_print, complain, encode_all, open_missing

# Importing makes far more objects than these, and no garbage: looking for it takes a fifth of a short command's time.
_MANY_OBJECTS = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Exit codes: 0 reached; 1 refused, rejected, pending or partial; 2 bad usage or input, denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by a signal.

    Args:
        arguments: The words after the program's name; None: those of this process.

    Returns:
        The exit code, for ``sys.exit``.
    """
    # No list() here: that name is a module of this package once it is imported.
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    open_missing()
    encode_all()
    if arguments is None:
        gc.set_threshold(_MANY_OBJECTS)
        atexit.register(gc.freeze)  # nor at the end, when everything goes anyway
    try:
        return _run(words)
    except KeyboardInterrupt:  # while the imports ran, or after the result: in between it is handled
        return 130


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["--version"]:
        try:
            print(f"qmpvcpu {qmpvcpu.__version__}", flush=True)
        except OSError as error:
            return cannot_print(error)
        return 0
    try:
        # Not at the top: without the extra, an import error here would be a traceback instead of a sentence.
        from qmpvcpu.cli.app import run

        return run(words)
    except ImportError as error:
        if error.name == "qemu.qmp":
            complain(f"qmpvcpu: {error}")
            return 2
        if error.name != "click":
            raise
        return _without_extra(words)


def _without_extra(words: Sequence[str]) -> int:
    """Play the demo, which needs no more than the package itself; say of all else what it needs."""
    if words == ["demo"]:
        from qmpvcpu.cli.demo import demo_alone
        from qmpvcpu.cli.run import Options, carry_out

        return carry_out(Options(), demo_alone)
    complain("qmpvcpu: the command line needs click, which is not installed: pip install 'qmpvcpu[cli]'")
    return 2
