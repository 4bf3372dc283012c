"""Another time of day for one program: a small library that stands before the C library, compiled when it is needed.

libfaketime will not do: with monotonic time left alone, version 0.9.10 breaks Python's ``time.sleep``.
"""

import asyncio
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Final

from qmpvcpu.errors import QmpVcpuError, printable

_COMPILERS: Final = ("cc", "gcc", "clang", "tcc")
_LIBRARY: Final = "clock.so"


class ClockError(QmpVcpuError):
    """No program can be given another time of day here."""


def find_compiler() -> str | None:
    """Return the C compiler of this machine; None: there is none, and all programs have the machine's time of day."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


async def other_clock(offset: float, directory: Path) -> dict[str, str]:
    """Return the variables that make a program's time of day, and that of what it starts, another.

    Only programs that ask the C library see it: Python and QEMU do, programs in Go (nats-server) do not. Monotonic
    time stays the machine's.

    Args:
        offset: Seconds by which it is ahead of the machine's; negative: behind.
        directory: Where the library is, or is put; for as long as the program runs.

    Raises:
        ClockError: There is no C compiler, or it failed.
    """
    library = directory / _LIBRARY
    if not library.exists():
        await _compile(library)
    return {"LD_PRELOAD": str(library), "QMPVCPU_CLOCK_OFFSET": repr(float(offset))}


async def _compile(library: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise ClockError(f"no C compiler to shift a clock with: install one of {', '.join(_COMPILERS)}")
    made = library.with_suffix(".new")
    with resources.as_file(resources.files(__package__).joinpath("clock.c")) as source:
        process = await asyncio.create_subprocess_exec(
            *(compiler, "-shared", "-nostdlib", "-fPIC", "-fno-builtin", "-o", made, source),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        _, stderr = await process.communicate()
    if process.returncode:
        why = stderr.decode(errors="replace").strip()
        raise ClockError(f"{compiler} does not compile the library that shifts a clock: {printable(why)}")
    made.rename(library)  # whole, whoever else does the same
