"""A VM whose guest is the micro-guest: up in a tenth of a second, with the answers a test wants."""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from qmpvcpu.given import checked
from qmpvcpu.testing.guestvm import TIMEOUT, GuestVm, cpu_args
from qmpvcpu.testing.qemu import Accelerator, probe_accelerator
from qmpvcpu.testing.rom import RULE_SIZE, Behaviour, pack_rules, rom_image

_KVM_TIMEOUT = 3.0  # s: the guest is ready in 0.1; where KVM cannot run it, nothing more comes
_WORDS = {  # that the guest says
    b"B": "that it listens",
    b"R": "that it is ready",
    b"t": "that it took up its behaviours",
    b"s": "that it looks",
}


class MicroGuest(GuestVm):
    """A QEMU that runs the micro-guest; an async context manager.

    When it is entered the guest is ready: it answers plugs and unplugs as its behaviours say, and sleeps
    otherwise. It is killed at the end.

    Args:
        qemu: The QEMU to run; None: :func:`~qmpvcpu.testing.best_qemu`.
        machine: ``q35`` or ``pc``, also with a version, and with options after a comma.
        accel: ``kvm`` or ``tcg``; None: KVM if the guest runs under it, else TCG.
        boot: vCPUs there from the start: a count, or ids with 0 among them. Those after the first gap are made with
            ``-device`` under the ids ``vcpuN``.
        max_vcpus: How many there can be.
        topology: As in ``-smp``; None: ``sockets=2,cores=2,threads=2`` for 8 vCPUs, else one socket for each.
        behaviour: How it answers: one behaviour, or several; for each slot the first that fits applies.
        ready_after_ms: Time until the guest is ready, as in :func:`~qmpvcpu.testing.rom_image`.
        wait: Wait until it is ready when entered; False (as needed with ``-S``): only until QEMU answers QMP.
        incoming: Start no guest, but wait for one that migrates here (``-incoming defer``); entered, QEMU answers
            QMP. Once ``migrate-incoming`` has brought a micro-guest it can be spoken with as on its source;
            *behaviour* and *ready_after_ms* come with it.
        extra_args: More arguments for QEMU.
        qmp_sockets: How many QMP sockets QEMU gets: each serves one client at a time.

    Attributes:
        process: The :class:`~qmpvcpu.testing.QemuProcess`, once entered.
        accelerator: What it runs under, once entered.

    Raises:
        TypeError: *behaviour* is none.
        ValueError: *boot*, *topology* or *behaviour* do not fit *max_vcpus*, or a behaviour never applies.

    Example:
        >>> import qmpvcpu
        >>> slow = Behaviour.slow(300).for_slot(2)
        >>> async with MicroGuest(behaviour=slow) as guest, qmpvcpu.attach(guest.qmp) as vm:
        ...     await vm.plug(2)
        ...     await vm.unplug(2)  # takes the guest 0.3 s
        VcpuMap('2')
        VcpuMap('2')
    """

    _name = "the micro-guest"

    @checked
    def __init__(
        self,
        qemu: Path | None = None,
        *,
        machine: str = "q35",
        accel: Accelerator | None = None,
        boot: int | Collection[int] = 1,
        max_vcpus: int = 8,
        topology: str | None = None,
        behaviour: Behaviour | Iterable[Behaviour] = (),
        ready_after_ms: int = 0,
        wait: bool = True,
        incoming: bool = False,
        extra_args: Sequence[str] = (),
        qmp_sockets: int = 2,
    ) -> None:
        super().__init__(qemu, accel, qmp_sockets=qmp_sockets)
        self._wait = wait and not incoming
        # A guest that arrives has said that it listens where it came from, and does so still.
        self._known = b"B" if incoming else b""
        self._max_vcpus = max_vcpus
        self._rom = rom_image(behaviour, ready_after_ms=ready_after_ms, slots=max_vcpus)
        self._args = [
            *("-machine", machine, "-m", "16", "-bios", "microguest.rom"),
            *cpu_args(boot, max_vcpus, topology, extra_args),
            *(("-incoming", "defer") if incoming else ()),
            *extra_args,
        ]
        self._heard = bytearray()  # what the guest said and nobody waited for yet

    @staticmethod
    def spelled_out(said: str) -> str:
        """What the guest said on its serial port, a line for each of its words."""
        meanings = {word.decode(): meaning for word, meaning in _WORDS.items()}
        return "\n".join(
            f"{word}: {meanings.get(word, 'a word that the micro-guest does not have')}" for word in said
        )

    @checked
    async def wait_ready(self, *, timeout: float = TIMEOUT) -> None:
        """Return when the guest has booted once more than this was answered; after a reset: when it is up again.

        Entering answers it once, unless told not to wait.

        Raises:
            QemuProcessError: It did not come up within *timeout* seconds, or QEMU ended.
        """
        await self._hear_word(b"R", timeout=timeout)

    async def set_behaviour(self, behaviour: Behaviour | Iterable[Behaviour] = ()) -> None:
        """Give the guest other behaviours; returns when it has taken them up.

        They outlive a reset, and count for a removal that the guest is waiting out (:meth:`Behaviour.slow`,
        :meth:`Behaviour.hanging`): it is decided anew. Removals that were ignored are still pending in QEMU, and are
        looked at with the next hot-plug event of any CPU, or :meth:`scan_slots`.

        Raises:
            TypeError: They are no behaviours.
            ValueError: Too many behaviours, or one that never applies.
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        rules = pack_rules(behaviour, slots=self._max_vcpus)
        await self._tell(b"T" + bytes([len(rules) // RULE_SIZE]) + rules, answer=b"t")

    async def refuse(self, status: int = 0x82, *, slot: int | None = None) -> None:
        """Make the guest refuse to give up a vCPU, or any; the other slots comply.

        Args:
            status: The _OST status that it answers; 0x82: the device is busy.
            slot: The slot, on x86 the vCPU id; None: all.

        Raises:
            ValueError: The status is no refusal, or the VM has no such slot.
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        refusing = Behaviour.refusing(status)
        await self.set_behaviour(refusing if slot is None else refusing.for_slot(slot))

    async def comply(self) -> None:
        """Make the guest give up every vCPU that it is asked for.

        Raises:
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        await self.set_behaviour()

    async def scan_slots(self) -> None:
        """Make the guest look for hot-plug events now, as if one had come; returns when it is about to.

        Raises:
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        await self._tell(b"S", answer=b"s")

    async def _to_try(self, qemu: Path) -> Sequence[Accelerator]:
        # One that nobody waits for does not tell whether it runs.
        return ("kvm", "tcg") if self._wait else (await probe_accelerator(qemu),)

    async def _boot(self, qemu: Path, accel: Accelerator) -> None:
        self.accelerator = accel
        self._heard[:] = self._known
        timeout = _KVM_TIMEOUT if accel == "kvm" and self._accel is None and self._wait else TIMEOUT
        await self._start(qemu, self._args, files={"microguest.rom": self._rom})
        async with self._coming_up():
            if self._wait:
                await self.wait_ready(timeout=timeout)
            else:
                await self.process.wait_ready(timeout=timeout)

    async def _take_in(self, reader: asyncio.StreamReader) -> bool:
        said = await reader.read(64)
        self._heard += said
        return bool(said)

    async def _tell(self, message: bytes, *, answer: bytes) -> None:
        await self._hear_word(b"B", consume=False)  # earlier it would be lost: the guest empties the port's buffer
        self._say(message)
        await self._hear_word(answer)

    async def _hear_word(self, word: bytes, *, timeout: float = TIMEOUT, consume: bool = True) -> None:
        def said() -> bool:
            return word in self._heard

        await self._hear(said, f"say {_WORDS[word]}", timeout=timeout)
        if consume:
            self._heard.remove(word[0])
