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
# for alive for 20 s, and first needs minutes where it needs 2 s here. The domains are this shell's to bury too: they
# outlive a daemon that is stopped. Its standard input takes a signal's name for the daemon, then a line to start it.
DAEMON = """
for folder in /etc/libvirt /run/libvirt /var/cache/libvirt /var/log/libvirt; do
  mkdir -p $folder && mount -t tmpfs none $folder
done
mkdir -p /var/lib/libvirt "$1/lib" && mount --bind "$1/lib" /var/lib/libvirt
cat >/etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
remember_owner = 0
cgroup_controllers = [$3]
END
cat >/etc/libvirt/libvirtd.conf <<END
unix_sock_dir = "$1"
auth_unix_rw = "none"
log_outputs = "2:file:$1/monitor.log 3:stderr"
END
[ "$2" ] && echo 'log_filters = "2:qemu_monitor"' >>/etc/libvirt/libvirtd.conf
[ "$3" ] && umount -l /sys/fs/cgroup/unified  # where it is mounted, libvirt takes it, though it has no controller
exec 3<&0
while :; do
  libvirtd --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid </dev/null &
  daemon=$!
  { read -r signal <&3 && kill -s "$signal" "$daemon"; } &
  wait "$daemon"
  echo stopped
  { read -r again <&3; } &
  wait $!
done
"""
DEADLINE_S = 45.0


class VirshError(Exception):
    """virsh refused; its text is libvirt's."""


@dataclass(frozen=True)
class Libvirt:
    """A running libvirtd, and the namespaces that it lives in.

    Attributes:
        socket: Where virsh talks to it.
        shell: What starts and stops the daemon.
    """

    socket: Path
    shell: "subprocess.Popen[str]"

    @property
    def folder(self) -> Path:
        """Its own folder: other files and sockets of a test may lie there, and are gone with it."""
        return self.socket.parent

    @property
    def monitor_log(self) -> Path:
        """What went over every domain's QMP monitor, as libvirtd logs it if it was told to."""
        return self.folder / "monitor.log"

    def monitor_socket(self, name: str) -> Path:
        """Return libvirt's own QMP socket of a domain that runs; free while the daemon is stopped."""
        number = self.virsh("domid", name).strip()
        return self.folder / "lib" / "qemu" / f"domain-{number}-{name}" / "monitor.sock"

    def stop(self, signal: str = "TERM") -> None:
        """End the daemon alone: its domains run on, its folders stay; returns when it has ended."""
        self._tell(signal)
        assert self.shell.stdout is not None
        assert self.shell.stdout.readline() == "stopped\n"

    def start(self) -> None:
        """Start the daemon again, with the folders that it had; returns when it answers."""
        self._tell("again")
        self.wait_up()

    def wait_up(self) -> None:
        """Return when the daemon answers."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.answers():
            told = (self.folder / "log").read_text()
            assert self.shell.poll() is None, f"libvirtd ended: {told}"
            assert time.monotonic() < deadline, f"libvirtd does not answer: {told}"
            time.sleep(0.05)

    def _tell(self, word: str) -> None:
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"{word}\n")
        self.shell.stdin.flush()

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
def running_libvirtd(*, log_monitors: bool = False, cgroups: bool = False) -> Iterator[Libvirt]:
    """Start one, as root or in a user namespace of its own, and end it with all that it runs.

    *log_monitors*: it takes down what goes over the domains' monitors, which takes its time. *cgroups*: it puts each
    domain's threads into cgroups with a cpuset, which takes root, and cgroups of version 1.
    """
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    # Not a test's temporary folder: a UNIX socket's path is 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="libvirt-", dir="/tmp"))
    namespaces = ["unshare", *user, "--mount", "--net", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child"]
    with (folder / "log").open("wb") as log:
        shell = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                *namespaces,
                "sh",
                "-c",
                DAEMON,
                "sh",
                folder,
                "yes" if log_monitors else "",
                '"cpu", "cpuset"' if cgroups else "",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        libvirt = Libvirt(folder / "libvirt-sock", shell)
        libvirt.wait_up()
        yield libvirt
    finally:
        shell.kill()
        shell.communicate()  # until the last that could write into the folder has closed its end
        shutil.rmtree(folder)
