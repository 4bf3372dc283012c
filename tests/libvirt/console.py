"""One virsh for many commands: a process for each would be most of what a comparison costs."""

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.libvirt.daemon import Libvirt, VirshError


class Console:
    """A virsh that takes one command after another."""

    def __init__(self, process: "subprocess.Popen[str]", document: Path) -> None:
        self._process = process
        self._document = document
        self._marks = itertools.count()

    def ask(self, command: str) -> str:
        """Run a command of virsh; return what it prints."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        mark = f"=={next(self._marks)}=="
        self._process.stdin.write(f"{command}\necho {mark}\n")
        self._process.stdin.flush()
        lines: list[str] = []
        # virsh repeats each command behind its prompt, and writes what it echoes without a line's end.
        while not (line := self._process.stdout.readline()).endswith(f"echo {mark}\n"):
            assert line, f"virsh ended: {''.join(lines)}"
            lines.append(line)
        lines.append(line.rpartition("virsh # ")[0])  # what a command prints need not end a line
        assert self._process.stdout.read(len(mark)) == mark
        told = "".join(lines[1:])
        if "error: " in told:
            raise VirshError(told)
        return told

    def refusal(self, xml: bytes) -> str:
        """Define a domain; return what libvirt says against it, or "" if it takes it. The schema is not asked."""
        self._document.write_bytes(xml)
        try:
            self.ask(f"define {self._document}")
        except VirshError as error:
            return str(error)
        return ""


@contextlib.contextmanager
def open_console(libvirt: Libvirt) -> Iterator[Console]:
    """Start a virsh, and end it."""
    with (
        tempfile.NamedTemporaryFile(suffix=".xml") as document,
        subprocess.Popen(
            ["virsh", "--quiet", "--connect", f"qemu+unix:///system?socket={libvirt.socket}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        yield Console(process, Path(document.name))
