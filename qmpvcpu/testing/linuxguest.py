"""A VM with a small real Linux that brings plugged CPUs online, says what it sees, and refuses when told."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.given import checked
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.testing.guestvm import TIMEOUT, GuestVm, default_topology
from qmpvcpu.testing.qemu import Accelerator, QemuProcessError, cache_directory

HOW_TO_MAKE: Final = "python -m qmpvcpu.testing.linuxguest"
"""The command that makes the Linux guest on this machine."""

_KERNEL_TIMEOUT = 2.0  # s: under a KVM that runs operating systems the kernel prints within 0.5
_BOOT_TIMEOUT = 60.0  # 3 s on a quiet machine under TCG
_POLL = 0.02
_TAIL = 20  # lines of the console that an error shows
_KERNEL_OPTIONS = (
    "console=ttyS0 earlyprintk=ttyS0 quiet panic=0 nokaslr mitigations=off no_timer_check cryptomgr.notests audit=0"
)


class LinuxGuestMissingError(QmpVcpuError):
    """The kernel or the initramfs of the Linux guest has not been made on this machine."""


class LinuxGuest(GuestVm):
    """A QEMU that runs the Linux guest; an async context manager.

    When it is entered, Linux is up (with *incoming*: expected). It brings every plugged CPU online by itself. It is
    killed at the end. Its CPU numbers are Linux's own, which are not vCPU ids. Linux 6.1 counts in the
    order of plugging. 6.12 has fixed all numbers at boot: first the CPUs that are there, then the others by ascending
    vCPU id, so that vCPU 5 is its CPU 5 where it booted with the first ones.

    Args:
        qemu: The QEMU to run; None: :func:`~qmpvcpu.testing.best_qemu`. Under TCG only 10.0 and newer survive
            an unplug.
        machine: ``q35`` or ``pc``, also with a version, and with options after a comma.
        accel: ``kvm`` or ``tcg``; None: KVM if it runs an operating system here, else TCG.
        boot: How many vCPUs are there from the start.
        max_vcpus: How many there can be.
        topology: As in ``-smp``; None: ``sockets=2,cores=2,threads=2`` for 8 vCPUs, else one socket for each.
        memory_mib: Memory of the VM in MiB.
        incoming: Boot nothing, but wait for a Linux that migrates here (``-incoming defer``); entered, QEMU answers
            QMP. Needs *accel*, that of the source. Once ``migrate-incoming`` has brought one, ``online`` asks it.
        kernel: Another kernel image, with serial console, ACPI CPU hotplug and devtmpfs built in; None: the one that
            was made.
        kernel_options: Appended to the kernel's command line.
        extra_args: More arguments for QEMU. A ``-cpu`` gets ``-hypervisor`` under TCG, unless it names that feature:
            without, Linux from 6.12.77 on takes no CPUs but those of its boot.
        qmp_sockets: How many QMP sockets QEMU gets: each serves one client at a time.
        timeout: Seconds that it may take to boot.

    Attributes:
        process: The :class:`~qmpvcpu.testing.QemuProcess`, once entered.
        accelerator: What it runs under, once entered.

    Example:
        >>> async def a_busy_guest_refuses():
        ...     async with LinuxGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        ...         await vm.plug(2)
        ...         await guest.wait_online(lambda cpus: len(cpus) == 3)
        ...         await guest.refuse()
        ...         await vm.unplug(2)  # raises UnplugRefusedError
    """

    _name = "Linux"

    @checked
    def __init__(
        self,
        qemu: Path | None = None,
        *,
        machine: str = "q35",
        accel: Accelerator | None = None,
        boot: int = 2,
        max_vcpus: int = 8,
        topology: str | None = None,
        memory_mib: int = 256,
        incoming: bool = False,
        kernel: Path | None = None,
        kernel_options: str = "",
        extra_args: Sequence[str] = (),
        qmp_sockets: int = 2,
        timeout: float = _BOOT_TIMEOUT,
    ) -> None:
        if incoming and accel is None:
            raise ValueError("what a Linux that arrives runs under is its source's: name it (accel)")
        super().__init__(qemu, accel, qmp_sockets=qmp_sockets)
        self._kernel = kernel
        self._incoming = incoming
        self._timeout = timeout
        self._args = [
            *("-machine", machine, "-m", str(memory_mib)),
            *("-smp", f"{boot},maxcpus={max_vcpus},{topology or default_topology(max_vcpus)}"),
            *("-append", f"{_KERNEL_OPTIONS} {kernel_options}".strip()),
            # The first serial port is the kernel's console, the second (from QemuProcess) the control channel.
            *("-chardev", "file,id=console,path=console", "-serial", "chardev:console"),
            *(("-incoming", "defer") if incoming else ()),
            *extra_args,
        ]
        self._command = asyncio.Lock()
        self._answers: list[str] = []
        self._online: VcpuMap | None = None

    @property
    def console(self) -> str:
        """What the kernel printed so far; empty once QEMU is gone."""
        with contextlib.suppress(FileNotFoundError):
            return (self.process.directory / "console").read_text(errors="replace")
        return ""

    async def ping(self) -> None:
        """Return when the guest has answered.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        await self._ask("ping", "pong")

    async def online(self) -> VcpuMap:
        """The CPUs that Linux runs on now, asked from the guest; Linux's numbers.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        self._online = VcpuMap.parse(await self._ask("online", "online "))
        return self._online

    async def present(self) -> VcpuMap:
        """The CPUs that Linux knows to be plugged now, online or not; Linux's numbers.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        return VcpuMap.parse(await self._ask("present", "present "))

    @checked
    async def wait_online(
        self,
        condition: Callable[[VcpuMap], bool],
        *,
        timeout: float = TIMEOUT,
    ) -> VcpuMap:
        """Return the CPUs that Linux runs on as soon as they meet *condition*; Linux's numbers.

        The guest announces each change, so nothing is polled.

        Raises:
            QemuProcessError: They did not within *timeout* seconds, or QEMU ended.
        """
        met: list[VcpuMap] = []

        def is_met() -> bool:
            if self._online is not None and condition(self._online):
                met.append(self._online)
            return bool(met)

        await self._hear(is_met, "report the awaited CPUs", timeout=timeout)
        return met[0]

    @checked
    async def refuse(self, cpu: int | None = None) -> None:
        """Make Linux refuse to give up CPUs, like a guest that has reserved them for real-time tasks.

        It answers a removal with OST status 0x82 (busy). Returns when Linux runs on every vCPU that QEMU has, those
        that were plugged just now included, and refuses. That holds until ``comply``.

        Args:
            cpu: Linux's own number of the CPU, which is not the vCPU id; None: all CPUs, and those plugged later too,
                from when ``wait_online`` tells them.

        Raises:
            QemuProcessError: It does not answer, it does not run on every vCPU within 10 seconds, it has no such CPU,
                or QEMU ended.

        Source: Linux vetoes taking a CPU offline that SCHED_DEADLINE reservations need: kernel/sched/core.c.
        """
        await self._all_online()
        if cpu is None:
            await self._ask("refuse on", "refuse on ")
        elif await self._ask(f"refuse cpu {cpu}", f"refuse cpu {cpu} ") != "1":
            raise self._failure(f"Linux cannot be made to refuse CPU {cpu}")

    async def comply(self) -> None:
        """Make Linux give up CPUs again; returns when a removal would succeed.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        await self._ask("refuse off", "refuse off")

    async def _all_online(self) -> None:
        """Return when Linux runs on every vCPU that QEMU has: one that is offline would leave without being asked."""
        seen, plugged = VcpuMap(), 0
        try:
            async with asyncio.timeout(TIMEOUT):
                while True:
                    seen, plugged = await self.online(), await self.process.count_vcpus()
                    if len(seen) >= plugged:
                        return
                    await asyncio.sleep(_POLL)
        except TimeoutError as why:
            raise self._failure(
                f"Linux cannot refuse: within {TIMEOUT:g} s it ran on CPUs {seen} only, QEMU has {plugged} vCPUs"
            ) from why

    async def _boot(self, qemu: Path, accel: Accelerator) -> None:
        kernel, initramfs = find_images()
        args = ["-kernel", str(self._kernel or kernel), "-initrd", str(initramfs), *self._args]
        self.accelerator = accel
        self._online = None
        await self._start(qemu, _as_under_a_hypervisor(args) if accel == "tcg" else args)
        async with self._coming_up():
            if self._incoming:
                await self.process.wait_ready()
                return
            if self._accel is None and accel == "kvm":
                await self._kernel_speaks()
            await self._hear(lambda: self._online is not None, "report that it is up", timeout=self._timeout)

    async def _kernel_speaks(self) -> None:
        """Return when the kernel has printed: it does so in 64-bit mode, which not every host's KVM runs."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KERNEL_TIMEOUT):
                while self.process.returncode is None:
                    if self.console:
                        return
                    await asyncio.sleep(_POLL)
        raise self._failure("the kernel printed nothing")

    async def _take_in(self, reader: asyncio.StreamReader) -> bool:
        said = (await reader.readline()).decode(errors="replace").strip()
        word, _, rest = said.partition(" ")
        if word in {"ready", "changed"}:
            self._online = VcpuMap.parse(rest)
        else:
            self._answers.append(said)
        return bool(said)

    async def _ask(self, command: str, prefix: str) -> str:
        """Send *command*; return what follows *prefix* in its answer."""

        def answers() -> list[str]:
            return [said.removeprefix(prefix) for said in self._answers if said.startswith(prefix)]

        async with self._command:
            self._answers.clear()  # one to a command whose caller was cancelled may still be there
            self._say(f"{command}\n".encode())
            await self._hear(lambda: bool(answers()), f"answer {command!r}")
            return answers()[0]

    def _failure(self, why: str, *, start: bool = False) -> QemuProcessError:
        """The error that says *why*, with what Linux reported last and the end of the console as evidence."""
        if self._online is not None:
            why += f"; it reported CPUs {self._online}"
        if tail := "\n".join(self.console.splitlines()[-_TAIL:]):
            why += f"; the console ends with:\n{tail}"
        return super()._failure(why, start=start)


def _as_under_a_hypervisor(args: Sequence[str]) -> list[str]:
    """Arguments under which Linux detects a hypervisor: TCG is none to it.

    Linux from 6.12.77 on (commit adbf61cc47cb) takes no CPUs but those of its boot unless it detects one. It detects
    VMware by the serial number, but only where the CPU does not say that there is another.
    """
    changed = ["-cpu", "qemu64", "-smbios", "type=1,serial=VMware-1", *args]  # the last of an option counts
    for place, option in enumerate(changed[:-1]):
        if option == "-cpu" and "hypervisor" not in changed[place + 1]:
            changed[place + 1] += ",-hypervisor"
    return changed


def find_images() -> tuple[Path, Path]:
    """Return the kernel and the initramfs of the Linux guest.

    Raises:
        LinuxGuestMissingError: They have not been made.
    """
    home = cache_directory() / "linux"
    images = home / "vmlinuz", home / "initramfs.gz"
    for image in images:
        if not image.exists():
            raise LinuxGuestMissingError(f"no {image}: make the Linux guest with `{HOW_TO_MAKE}`")
    return images


def _build_script() -> Path:
    """The script that makes the guest: next to this module in a wheel, in ``fixtures`` in a checkout."""
    here = Path(__file__).parent
    packed = here / "linux" / "build.sh"
    return packed if packed.exists() else here.parents[1] / "fixtures" / "linux" / "build.sh"


if __name__ == "__main__":  # HOW_TO_MAKE
    os.execvp("bash", ["bash", str(_build_script())])  # noqa: S606, S607 - any bash will do
