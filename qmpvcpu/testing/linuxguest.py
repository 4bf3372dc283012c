"""A VM with a small real Linux that brings plugged CPUs online, says what it sees, and refuses when told."""

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from qmpvcpu.errors import QmpVcpuError, counted
from qmpvcpu.given import checked
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.testing.guestvm import TIMEOUT, GuestVm, cpu_args
from qmpvcpu.testing.qemu import Accelerator, QemuProcessError, cache_directory

HOW_TO_MAKE: Final = "python -m qmpvcpu.testing.linuxguest"
"""The command that makes the Linux guest on this machine."""

_KERNEL_TIMEOUT = 2.0  # s: under a KVM that runs operating systems the kernel prints within 0.5
_BOOT_TIMEOUT = 180.0  # 3 s on a quiet machine under TCG
_POLL = 0.02
_TAIL = 20  # lines of the console that an error shows
_AGENT = "agent"  # the agent's chardev and its port
_AGENT_ARGUMENTS = (
    *("-device", "virtio-serial-pci"),
    *("-device", f"virtserialport,id={_AGENT},chardev={_AGENT},name=org.qemu.guest_agent.0"),
)
_KERNEL_OPTIONS = (
    "console=ttyS0 earlyprintk=ttyS0 quiet panic=0 nokaslr mitigations=off no_timer_check cryptomgr.notests audit=0"
)


class LinuxGuestMissingError(QmpVcpuError):
    """The kernel or the initramfs of the Linux guest has not been made on this machine."""


class LinuxGuest(GuestVm):
    """A QEMU that runs the Linux guest; an async context manager.

    When it is entered, Linux is up (with *incoming*: expected). It brings every plugged CPU online by itself, and
    runs Debian's guest agent, unless told otherwise. It is killed at the end. Its CPU numbers are Linux's own, which
    are not vCPU ids. Linux 6.1 counts in the order of plugging. 6.12 has fixed all numbers at boot: first the CPUs
    that are there, then the others by ascending vCPU id, so that vCPU 5 is its CPU 5 where it booted with the first
    ones.

    A VM that is reset boots as it did first: what the methods changed is as the arguments say again.

    Args:
        qemu: The QEMU to run; None: :func:`~qmpvcpu.testing.best_qemu`. Under TCG only 10.0 and newer survive
            an unplug.
        machine: ``q35`` or ``pc``, also with a version, and with options after a comma.
        accel: ``kvm`` or ``tcg``; None: KVM if it runs an operating system here, else TCG.
        boot: vCPUs there from the start: a count, or ids with 0 among them. Those after the first gap are made with
            ``-device`` under the ids ``vcpuN``.
        max_vcpus: How many there can be.
        topology: As in ``-smp``; None: ``sockets=2,cores=2,threads=2`` for 8 vCPUs, else one socket for each.
        memory_mib: Memory of the VM in MiB.
        incoming: Boot nothing, but wait for a Linux that migrates here (``-incoming defer``); entered, QEMU answers
            QMP. Needs *accel*, that of the source. Once ``migrate-incoming`` has brought one, ``online`` asks it.
        kernel: The series of one that was made for it, such as ``"6.12"``; or another kernel image, with serial
            console, ACPI CPU hotplug and devtmpfs built in, and virtio-serial, without which there is no agent. None:
            the one that is always made.
        kernel_options: Appended to the kernel's command line.
        auto_online: Bring plugged CPUs online, as most distributions' rules do; False: leave them offline.
        hypervisor: Let Linux detect that it runs under a hypervisor: QEMU passes for VMware under TCG, which Linux
            does not take for one. False: it detects none, and from 6.12.77 on it takes no CPUs but those of its boot.
        agent_runs: Start the guest agent; False: its port is there, and nobody opens it.
        agent_blocks: Commands that the agent does not do.
        extra_args: More arguments for QEMU. A ``-cpu`` gets ``-hypervisor`` where Linux is not to believe the CPU
            about it, unless it names that feature.
        qmp_sockets: How many QMP sockets QEMU gets: each serves one client at a time.
        timeout: Seconds that it may take to boot.

    Attributes:
        process: The :class:`~qmpvcpu.testing.QemuProcess`, once entered.
        accelerator: What it runs under, once entered.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: *boot* or *topology* do not fit *max_vcpus*, or *incoming* comes without *accel*.

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
        boot: int | Collection[int] = 2,
        max_vcpus: int = 8,
        topology: str | None = None,
        memory_mib: int = 256,
        incoming: bool = False,
        kernel: Path | str | None = None,
        kernel_options: str = "",
        auto_online: bool = True,
        hypervisor: bool = True,
        agent_runs: bool = True,
        agent_blocks: Collection[str] = (),
        extra_args: Sequence[str] = (),
        qmp_sockets: int = 2,
        timeout: float = _BOOT_TIMEOUT,
    ) -> None:
        if incoming and accel is None:
            raise ValueError("what a Linux that arrives runs under is its source's: name it (accel)")
        super().__init__(qemu, accel, qmp_sockets=qmp_sockets)
        self._kernel = kernel
        self._incoming = incoming
        self._hypervisor = hypervisor
        self._timeout = timeout
        options = [_KERNEL_OPTIONS, kernel_options]  # the kernel hands what it does not know to the guest's init
        options += [] if auto_online else ["auto_online=off"]
        options += [] if agent_runs else ["agent=off"]
        options += [f"agent_blocks={_listed(agent_blocks)}"] if agent_blocks else []
        self._args = [
            *("-machine", machine, "-m", str(memory_mib)),
            *cpu_args(boot, max_vcpus, topology, extra_args),
            *_AGENT_ARGUMENTS,
            *("-append", " ".join(filter(None, options))),
            # The first serial port is the kernel's console, the second (from QemuProcess) the control channel.
            *("-chardev", "file,id=console,path=console", "-serial", "chardev:console"),
            *(("-incoming", "defer") if incoming else ()),
            *extra_args,
        ]
        self._command = asyncio.Lock()
        self._answers: list[str] = []
        self._online: VcpuMap | None = None
        self._boots = 0

    @property
    def console(self) -> str:
        """What the kernel printed so far; empty once QEMU is gone."""
        with contextlib.suppress(FileNotFoundError):
            return (self.process.directory / "console").read_text(errors="replace")
        return ""

    @property
    def agent(self) -> Path:
        """Path of the socket of the guest agent's port; it serves one client at a time."""
        return self.process.directory / _AGENT

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
    async def wait_ready(self, *, timeout: float = _BOOT_TIMEOUT) -> None:
        """Return when Linux has booted once more than this was answered; after a reset: when it is up again.

        Entering answers it once.

        Raises:
            QemuProcessError: It did not come up within *timeout* seconds, or QEMU ended.
        """
        await self._hear(lambda: self._boots > 0, "report that it is up", timeout=timeout)
        self._boots -= 1

    @checked
    async def set_auto_online(self, on: bool) -> None:  # noqa: FBT001 - the name says what is on
        """Make Linux bring plugged CPUs online, or leave those that come from now on offline.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        command = f"auto {'on' if on else 'off'}"
        await self._ask(command, command)

    @checked
    async def start_agent(self, *, blocks: Collection[str] = ()) -> None:
        """Start the guest agent, or end the one that runs and start another; returns when it has opened its port.

        Args:
            blocks: Commands that it does not do, such as ``guest-file-open``.

        Raises:
            QemuProcessError: Linux has no agent, or no virtio-serial; it does not answer, or QEMU ended.
        """
        command = f"agent start {_listed(blocks)}".rstrip()
        if await self._ask(command, "agent start ") != "1":
            raise self._failure("Linux started no agent")

    async def stop_agent(self) -> None:
        """End the guest agent as a crash does, which closes its port.

        Raises:
            QemuProcessError: Linux does not answer, or QEMU ended.
        """
        await self._ask("agent stop", "agent stop")

    async def pause_agent(self) -> None:
        """Stop the guest agent (SIGSTOP): its port stays open, and what it is asked is answered once it resumes.

        Raises:
            QemuProcessError: Linux does not answer, or QEMU ended.
        """
        await self._ask("agent pause", "agent pause")

    async def resume_agent(self) -> None:
        """Let a guest agent that was paused go on.

        Raises:
            QemuProcessError: Linux does not answer, or QEMU ended.
        """
        await self._ask("agent resume", "agent resume")

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
            ran = f"within {TIMEOUT:g} s it ran on CPUs {seen} only"
            raise self._failure(f"Linux cannot refuse: {ran}, QEMU has {counted(plugged, 'vCPU')}") from why

    async def _boot(self, qemu: Path, accel: Accelerator) -> None:
        kernel, initramfs = find_images(self._kernel)
        args = ["-kernel", str(kernel), "-initrd", str(initramfs), *self._args]
        if self._hypervisor and accel == "tcg":
            args = ["-smbios", "type=1,serial=VMware-1", *args]
        if not self._hypervisor or accel == "tcg":
            args = _with_a_silent_cpu(args)
        self.accelerator = accel
        self._online = None
        self._boots = 0
        await self._start(qemu, args, chardevs=[_AGENT])
        async with self._coming_up():
            if self._incoming:
                await self.process.wait_ready()
                return
            if self._accel is None and accel == "kvm":
                await self._kernel_speaks()
            await self.wait_ready(timeout=self._timeout)

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
            self._boots += word == "ready"
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


def _with_a_silent_cpu(args: Sequence[str]) -> list[str]:
    """Arguments of a CPU that does not say whether there is a hypervisor.

    Linux from 6.12.77 on (commit adbf61cc47cb) takes no CPUs but those of its boot unless it detects a hypervisor.
    TCG is none to it. It detects VMware by the serial number, but only if the CPU does not say that there is another.
    """
    changed = ["-cpu", "qemu64", *args]  # the last of an option counts
    for place, option in enumerate(changed[:-1]):
        if option == "-cpu" and "hypervisor" not in changed[place + 1]:
            changed[place + 1] += ",-hypervisor"
    return changed


def _listed(commands: Collection[str]) -> str:
    """The agent's commands as it takes them: with commas."""
    if isinstance(commands, str):
        raise TypeError(f"the agent's commands are a list, such as {[commands]}")
    for command in commands:
        if not re.fullmatch(r"[a-z-]+", command):
            raise ValueError(f"{command!r} is no command of the agent, such as 'guest-file-open'")
    return ",".join(commands)


def find_kernels() -> dict[str, Path]:
    """The kernels that were made for the guest, by series: ``{"6.1": path, "6.12": path}``; the main one first."""
    images = sorted((cache_directory() / "linux").glob("vmlinuz*"))
    return {series: image for image in images if (series := _series(image))}


def _series(image: Path) -> str:
    """The kernel's series, such as ``6.12``; empty for what is no kernel.

    Source:
        Documentation/arch/x86/boot.rst: the version as text is 0x200 bytes after what ``kernel_version`` says.
    """
    with image.open("rb") as file:
        file.seek(0x20E)
        file.seek(int.from_bytes(file.read(2), "little") + 0x200)
        found = re.match(rb"\d+\.\d+", file.read(16))
    return found[0].decode() if found else ""


def find_images(kernel: Path | str | None = None) -> tuple[Path, Path]:
    """Return the kernel and the initramfs of the Linux guest.

    Args:
        kernel: As in :class:`LinuxGuest`.

    Raises:
        LinuxGuestMissingError: They have not been made, or this user may not look at them.
    """
    home = cache_directory() / "linux"
    images = home / "vmlinuz", home / "initramfs.gz"
    for image in images:
        if not os.access(image, os.R_OK):
            raise LinuxGuestMissingError(f"no {image}: make the Linux guest with `{HOW_TO_MAKE}`")
    if isinstance(kernel, str) and re.fullmatch(r"\d+\.\d+", kernel):
        made = find_kernels()
        if kernel not in made:
            raise LinuxGuestMissingError(f"no Linux {kernel} in {home}, which has {', '.join(made)}")
        kernel = made[kernel]
    return Path(kernel or images[0]), images[1]


def _build_script() -> Path:
    """The script that makes the guest: next to this module in a wheel, in ``fixtures`` in a checkout."""
    here = Path(__file__).parent
    packed = here / "linux" / "build.sh"
    return packed if packed.exists() else here.parents[1] / "fixtures" / "linux" / "build.sh"


if __name__ == "__main__":  # HOW_TO_MAKE
    os.execvp("bash", ["bash", str(_build_script())])  # noqa: S606, S607 - any bash will do
