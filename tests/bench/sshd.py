"""An sshd on the loopback interface that plays every host, and one ssh per host, some at once, as people do it."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Sshd", "running_sshd"]

AT_ONCE = 16
# sshd started by root needs a user of its own and a directory in /run: both are there for this process alone.
_AS_ROOT = (
    'mount --bind "$1" /etc/passwd && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && shift && exec "$@"'
)
_SERVER = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
MaxStartups 1000
MaxSessions 1000
LogLevel FATAL
"""
_CLIENT = """
Host *
HostName 127.0.0.1
Port {port}
User {user}
IdentityFile {folder}/key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking yes
HostKeyAlias server
BatchMode yes
LogLevel FATAL
Host *.kept
ControlMaster auto
ControlPath {folder}/%n
ControlPersist 600
"""


@dataclass(frozen=True)
class Sshd:
    """The server, and how to reach it.

    Attributes:
        pid: Its process; those of sessions are its children.
        config: The client's file: ``HOST`` connects each time; ``HOST.kept`` keeps the connection (ControlMaster).
    """

    pid: int
    config: Path

    async def on_each(self, hosts: Sequence[str], commands: Sequence[Sequence[str | Path]]) -> list[bytes]:
        """Run one of *commands* on each of *hosts*, some at once, and return what they print.

        Raises:
            RuntimeError: One of them failed.
        """
        room = asyncio.Semaphore(AT_ONCE)

        async def one(host: str, command: Sequence[str | Path]) -> bytes:
            async with room:
                ssh = await asyncio.create_subprocess_exec(
                    "ssh", "-F", self.config, host, *command, stdin=-3, stdout=-1, stderr=-3
                )
                printed, _ = await ssh.communicate()
                if ssh.returncode:
                    raise RuntimeError(f"ssh {host} ended with {ssh.returncode}: {printed[-400:]!r}")
                return printed

        return await asyncio.gather(*map(one, hosts, commands))


def find_sshd() -> Path | None:
    """Return this machine's sshd, that which fixtures/install.sh has unpacked, or None."""
    cache = Path(os.environ.get("QMPVCPU_CACHE") or Path("~/.cache/qmpvcpu").expanduser())
    every = (Path("/usr/sbin/sshd"), cache / "openssh-server/usr/sbin/sshd")
    return next((path for path in every if path.exists()), None) if shutil.which("ssh") else None


@contextlib.asynccontextmanager
async def running_sshd(folder: Path) -> AsyncIterator[Sshd | None]:
    """An sshd with keys made for it, in *folder*; None where there is no program."""
    program = find_sshd()
    if program is None:
        yield None
        return
    folder.mkdir()
    for key in ("key", "host_key"):
        making = await asyncio.create_subprocess_exec(
            *("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"), folder / key
        )
        assert await making.wait() == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    user = Path("~").expanduser().owner()
    texts = {name: text.format(port=port, folder=folder, user=user) for name, text in _FILES.items()}
    known = (folder / "host_key.pub").read_text().split()
    texts["known_hosts"] = f"server {known[0]} {known[1]}\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
    with _serving(program, folder) as pid:
        for _ in range(100):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                break
        sshd = Sshd(pid, folder / "client")
        try:
            yield sshd
        finally:
            await _let_go(folder, sshd.config)


_FILES = {"server": _SERVER, "client": _CLIENT}


@contextlib.contextmanager
def _serving(program: Path, folder: Path) -> Iterator[int]:
    libraries = program.parents[2] / "usr/lib/x86_64-linux-gnu"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)} if program.parents[2] != Path("/") else None
    command: list[str | Path] = [program, "-D", "-e", "-f", folder / "server"]
    if os.geteuid() == 0:
        lines = Path("/etc/passwd").read_text().replace("root:x:", "root:*:")  # a locked root has no shell
        (folder / "passwd").write_text(f"{lines}sshd:*:65533:65534::/run/sshd:/usr/sbin/nologin\n")
        command = ["unshare", "--mount", "sh", "-c", _AS_ROOT, "sh", folder / "passwd", *command]
    server = subprocess.Popen(command, env=environment)
    try:
        yield server.pid
    finally:
        server.terminate()
        server.wait()


async def _let_go(folder: Path, config: Path) -> None:
    """End the connections that are kept."""
    for control in folder.glob("*.kept"):
        ending = await asyncio.create_subprocess_exec("ssh", "-F", config, "-O", "exit", control.name, stderr=-3)
        await ending.wait()
