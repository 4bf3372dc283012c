"""The command line in processes forked from one that has imported it: a fresh Python imports for half a second.

``python -m tests.cli.forking FD``: each message on that socket is a run: its words and environment, its three
standard files, and a socket on which its process id is told and, when it has ended, its exit code. The end of that
socket is the end of the server.
"""

import asyncio
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import qmpvcpu
from qmpvcpu.cli import main

_ROOT = Path(__file__).parents[2]
_LONGEST_REQUEST = 2**17


class Forked:
    """A run, with what an asyncio.subprocess.Process has."""

    def __init__(self, pid: int, out: asyncio.StreamReader, err: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = out
        self.stderr = err
        self.returncode: int | None = None
        self.ended = asyncio.Event()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        await self.ended.wait()
        assert self.returncode is not None
        return self.returncode

    async def communicate(self) -> tuple[bytes, bytes]:
        out, err, _ = await asyncio.gather(self.stdout.read(), self.stderr.read(), self.wait())
        return out, err


@contextlib.asynccontextmanager
async def forked(words: Sequence[str], env: Mapping[str, str]) -> AsyncIterator[Forked]:
    """Start the command line with *words*, with nothing on its standard input; it ends with the context."""
    async with contextlib.AsyncExitStack() as stack:
        out, out_end = await _pipe(stack)
        err, err_end = await _pipe(stack)
        nothing = os.open(os.devnull, os.O_RDONLY)
        ours, theirs = socket.socketpair()
        request = json.dumps([list(words), dict(env)]).encode()
        socket.send_fds(_server(), [request], [nothing, out_end, err_end, theirs.fileno()])
        theirs.close()
        for file in (nothing, out_end, err_end):
            os.close(file)
        told, writer = await asyncio.open_unix_connection(sock=ours)
        stack.callback(writer.close)
        process = Forked(int(await told.readline()), out, err)

        async def see_its_end() -> None:
            process.returncode = int(await told.readline())
            process.ended.set()

        seeing = asyncio.create_task(see_its_end())
        try:
            yield process
        finally:
            process.kill()
            await seeing


async def _pipe(stack: contextlib.AsyncExitStack) -> tuple[asyncio.StreamReader, int]:
    """Return the end of a new pipe that this process reads, and the other one."""
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        functools.partial(asyncio.StreamReaderProtocol, reader), os.fdopen(ours, "rb", 0)
    )
    stack.callback(transport.close)
    return reader, theirs


@functools.cache
def _server() -> socket.socket:
    """Start the server of this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = (sys.executable, "-m", "tests.cli.forking", str(theirs.fileno()))
        server = subprocess.Popen(command, cwd=_ROOT, pass_fds=[theirs.fileno()])

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


# The server's side.


def _serve(requests: socket.socket) -> Sequence[str] | None:
    """Fork a process for each request; return the words of its run in each, and None in the server at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever looks after a run ends unseen
    while True:
        request, files, *_ = socket.recv_fds(requests, _LONGEST_REQUEST, 4)
        if not request:
            return None
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            return _look_after(request, files)
        for file in files:
            os.close(file)


def _look_after(request: bytes, files: Sequence[int]) -> Sequence[str]:
    """Fork again, tell how that one ends, and end; in that one return the words of its run."""
    *standard, tell = files
    child = os.fork()
    if child:
        for file in standard:
            os.close(file)
        os.write(tell, b"%d\n" % child)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(tell, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(tell)
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    words, env = json.loads(request)
    os.environ.clear()
    os.environ.update(env)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as Python itself makes them
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
    sys.argv = ["-c", *words]
    return sys.argv[1:]


def _main() -> int:
    for module in pkgutil.walk_packages(qmpvcpu.__path__, "qmpvcpu."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()  # so that no fork, as it ends, looks through all that was imported, and has a copy of it made
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        words = _serve(requests)
    if words is None:
        os._exit(0)  # what its forks measured is saved by them; who waits for this one has no more use for its own
    return main(words)


if __name__ == "__main__":
    sys.exit(_main())
