"""A libvirtd of our own: its folders, processes and network live and end in namespaces of their own."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

# PID 1 stays a shell: it buries the QEMUs that libvirt tries out. A libvirtd whose dead are never reaped takes each
# for alive for 20 s, and first needs minutes where it needs 2 s here.
DAEMON = """
for folder in /etc/libvirt /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
  mkdir -p $folder && mount -t tmpfs none $folder
done
cat >/etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
remember_owner = 0
cgroup_controllers = []
END
cat >/etc/libvirt/libvirtd.conf <<END
unix_sock_dir = "$1"
auth_unix_rw = "none"
END
libvirtd --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid &
wait $!
"""
DEADLINE_S = 45.0


class VirshError(Exception):
    """virsh refused; its text is libvirt's."""


@dataclass(frozen=True)
class Libvirt:
    """A running libvirtd."""

    socket: Path

    def virsh(self, *words: str | Path) -> str:
        """Run virsh; return what it prints."""
        done = subprocess.run(
            ["virsh", "--quiet", "--connect", f"qemu+unix:///system?socket={self.socket}", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        if done.returncode:
            raise VirshError(done.stderr)
        return done.stdout

    def answers(self) -> bool:
        """True if the daemon takes connections and its QEMU driver is up."""
        try:
            return bool(self.virsh("version"))
        except VirshError:
            return False

    def define(self, xml: bytes) -> str:
        """Define a domain, its schema checked too; return its name."""
        with tempfile.NamedTemporaryFile(suffix=".xml") as file:
            file.write(xml)
            file.flush()
            self.virsh("define", "--validate", file.name)
        return str(etree.fromstring(xml).findtext("name"))

    def inactive(self, name: str) -> bytes:
        """Return libvirt's own document of a domain."""
        return self.virsh("dumpxml", "--inactive", name).encode()

    def forget_all(self) -> None:
        """Stop and undefine every domain."""
        for name in self.virsh("list", "--name").split("\n"):
            if name.strip():
                self.virsh("destroy", name)
        for name in self.virsh("list", "--all", "--name").split("\n"):
            if name.strip():
                self.virsh("undefine", name)


@contextlib.contextmanager
def running_libvirtd() -> Iterator[Libvirt]:
    """Start one, as root or in a user namespace of its own, and end it with all that it runs."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    # Not a test's temporary folder: a UNIX socket's path is 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="libvirt-", dir="/tmp"))
    log = folder / "log"
    namespaces = ["unshare", *user, "--mount", "--net", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-c", DAEMON, "sh", folder],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        libvirt = Libvirt(folder / "libvirt-sock")
        deadline = time.monotonic() + DEADLINE_S
        while not libvirt.answers():
            told = log.read_text()
            assert daemon.poll() is None, f"libvirtd ended: {told}"
            assert time.monotonic() < deadline, f"libvirtd does not answer: {told}"
            time.sleep(0.05)
        yield libvirt
    finally:
        daemon.kill()
        daemon.wait()
        shutil.rmtree(folder)
