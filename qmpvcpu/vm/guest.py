"""`Guest`: what the guest's own system says of its vCPUs, and what it can be told to do with them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.errors import (
    WITHOUT_AGENT,
    AgentConnectError,
    AgentForbiddenError,
    AgentSilentError,
    GuestAgentError,
    GuestNumberUnknownError,
    GuestRefusedError,
    InvalidMapError,
    MalformedAnswerError,
    Outcome,
    describe,
)
from qmpvcpu.events import Event, InstanceChanged, LayoutChanged, Reconnected, VcpuPlugged, VcpuUnplugged, VmReset
from qmpvcpu.given import checked
from qmpvcpu.model.guest import GuestOs, GuestVcpu
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.qapi import parse_status

if TYPE_CHECKING:
    from qmpvcpu.agent.door import GuestAgent, QemuSays
    from qmpvcpu.agent.numbering import Numbering
    from qmpvcpu.qmp.monitor import Monitor, Target

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_LIST: Final = "guest-get-vcpus"
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 0.5
_TRIES: Final = 3  # the VM may change while the guest is asked


class Guest:
    """The guest of one VM, through its agent: ``vm.guest``. Without ``attach(agent=)`` every call raises.

    What it says is the guest's word: a guest can lie, and no other VM is affected. Each call takes ``timeout``, in
    seconds for all of it. What every call raises:

    - ``AgentConnectError``: no agent can be reached, or none was given.
    - ``AgentSilentError``: it did not answer in time: absent, stopped, or busy.
    - ``AgentLostError``: it went away with the question.
    - ``AgentForbiddenError``: its configuration forbids a command that this needs.
    - ``MalformedAnswerError``: its answer makes no sense.

    Args:
        target: The agent's address, socket or client, as ``attach(agent=)`` takes it; None: there is none.
        layout: Returns the VM's layout, of now.
        monitor: Returns the VM's monitor, of now.
        on_list: Called with each list of the guest's: whether each vCPU that is known in it is online.
        on_os: Called with each answer that names the guest's system.
        qmp: The VM's own QMP target, which is no agent's.
        traced: Returns the context of a call, such as a span.

    Attributes:
        has_agent: True if an agent was given to ``attach``.
    """

    def __init__(
        self,
        target: "Target | None",
        layout: Callable[[], Layout],
        monitor: Callable[[], "Monitor"],
        on_list: Callable[[dict[int, bool]], object],
        on_os: Callable[[GuestOs], object],
        *,
        qmp: "Target | None" = None,
        traced: Callable[..., contextlib.AbstractContextManager[object]],
    ) -> None:
        self.has_agent = target is not None
        self._layout = layout
        self._monitor = monitor
        self._on_list = on_list
        self._on_os = on_os
        self._traced = traced
        self._agent: GuestAgent | None = None
        self._numbering: Numbering | None = None
        self._turn = asyncio.Lock()
        self._boot_id = b""
        self._os: GuestOs | None = None
        self._reads_files = True
        if target is not None:
            from qmpvcpu.agent import door, numbering  # not above: most VMs are attached without

            self._agent = door.GuestAgent(target, ask_qemu=self._ask_qemu, qmp=qmp)
            self._numbering = numbering.Numbering()

    @property
    def address(self) -> str:
        """Where the agent is, for messages; "" if none was given."""
        return "" if self._agent is None else self._agent.address

    # Questions.

    @checked
    async def vcpus(self, *, timeout: float = 10.0) -> tuple[GuestVcpu, ...]:
        """Return the guest's CPUs by number, and which vCPU each of them is, where that is known.

        A CPU that pseries lists and that is not plugged is left out.

        Raises:
            GuestAgentError: See the class.
        """
        with self._traced("guest.vcpus"):
            async with self._in_turn(timeout) as deadline:
                return await self._list(deadline)

    @checked
    async def set_online(self, ids: int | str | Iterable[int], *, timeout: float = 10.0) -> VcpuMap:
        """Have the guest use vCPUs that it has offline, and look whether it does.

        One that was just plugged is waited for: the guest may not have made a CPU of it yet.

        Args:
            ids: vCPU ids: one, libvirt's cpuset text, or ids.
            timeout: Seconds for all of it.

        Returns:
            Those that were offline before. Those that are online already are no error.

        Raises:
            GuestNumberUnknownError: Nothing tells which CPUs of the guest they are, or one is not plugged; nothing
                was done.
            GuestRefusedError: The guest refused, or does not show it; ``done`` names those that it did before.
            InvalidMapError: *ids* are none.
            GuestAgentError: See the class; ``outcome`` UNKNOWN if it may have been done.
        """
        return await self._set(ids, timeout, online=True)

    @checked
    async def set_offline(self, ids: int | str | Iterable[int], *, timeout: float = 10.0) -> VcpuMap:
        """Have the guest use vCPUs no longer, and look whether it does. QEMU is not told: they stay plugged.

        Args:
            ids: As ``set_online``.
            timeout: As ``set_online``.

        Returns:
            Those that were online before.

        Raises:
            QmpVcpuError: As ``set_online``. Most guests refuse for CPU 0, and where deadline tasks need the CPU.
        """
        return await self._set(ids, timeout, online=False)

    @checked
    async def os(self, *, timeout: float = 10.0) -> GuestOs:
        """Return what system runs in the guest. Until the VM is reset, plans and denials know it then.

        Raises:
            GuestAgentError: See the class.
        """
        with self._traced("guest.os"):
            return await self._read_os(asyncio.get_running_loop().time() + timeout)

    @checked
    async def commands(self, *, timeout: float = 10.0) -> frozenset[str]:
        """Return the commands that the agent carries out.

        Raises:
            GuestAgentError: See the class.
        """
        with self._traced("guest.commands"):
            return await self._door.commands(timeout=timeout)

    @checked
    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 10.0
    ) -> Any:
        """Ask the agent anything else, such as ``guest-exec``, and return its answer, which nothing has checked.

        Raises:
            GuestRefusedError: It answered with an error.
            GuestAgentError: See the class.
        """
        with self._traced("guest.execute", command=command):
            return await self._door.execute(command, arguments, timeout=timeout)

    async def close(self) -> None:
        """Let go of the agent."""
        if self._agent is not None:
            await self._agent.close()

    def found(self, status: VmStatus) -> None:
        """Take in what the VM did when it was attached to: one that has migrated may have booted elsewhere."""
        if self._numbering is not None:
            self._numbering.booted_here = status.migration == "none" and status.run_state != "inmigrate"

    def heard(self, event: Event) -> None:
        """Take in what became known of the VM: it may make numbers void."""
        numbering = self._numbering
        if numbering is None:
            return
        match event:
            case VcpuPlugged():
                numbering.plugged(event.ids, numbering.unanswered(self._layout()))
            case VcpuUnplugged():
                numbering.unplugged(event.ids)
            case VmReset():
                self._forget(self._layout().enabled)
            case InstanceChanged():
                self._forget(None)
                numbering.booted_here = False
            case LayoutChanged() | Reconnected():
                self._forget(None)

    def _forget(self, enabled: VcpuMap | None) -> None:
        if self._numbering is not None:
            self._numbering.rebooted(enabled)
        self._boot_id = b""
        self._os = None
        self._reads_files = True

    # How.

    @property
    def _door(self) -> "GuestAgent":
        if self._agent is None:
            hint = "attach(agent=ADDRESS) says where the agent's socket is"
            raise AgentConnectError("", "no agent was given", hint=hint)
        return self._agent

    @contextlib.asynccontextmanager
    async def _in_turn(self, timeout: float, about: str = "", *, hint: str = "") -> AsyncIterator[float]:
        """Ask while no other task does; yields the deadline. An error is *about* that, a silence has the *hint*."""
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            await self._take_turn(deadline, timeout)
            try:
                yield deadline
            finally:
                self._turn.release()
        except GuestAgentError as error:
            is_named = isinstance(error, GuestRefusedError | GuestNumberUnknownError) and error.ids
            is_silent = isinstance(error, AgentSilentError)
            error.concern("" if is_named else about, timeout=timeout, hint=hint if is_silent else "")
            raise

    async def _take_turn(self, deadline: float, timeout: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.acquire()
        except TimeoutError:
            raise AgentSilentError(self.address, "it is still busy with earlier questions", timeout=timeout) from None

    async def _list(self, deadline: float) -> tuple[GuestVcpu, ...]:
        agent = self._door
        numbering = self._numbering
        assert numbering is not None  # noqa: S101 - for mypy: it is there if the agent is
        for tries in range(_TRIES):
            seen = numbering.changes
            cpus = await agent.cpus(timeout=_rest(deadline))
            await self._check_boot(deadline)
            absent = await self._read_places(numbering.unknown(cpus), deadline)
            release = "" if not numbering.unknown(cpus) else await self._release(deadline)
            # With a new boot the list is that of the new one as well: it was asked for before, so once more.
            if numbering.changes == seen or tries + 1 == _TRIES:
                break
        is_current = numbering.changes == seen
        listed = numbering.resolve(cpus, self._layout(), release, is_current=is_current)
        self._on_list({cpu.vcpu: cpu.online for cpu in listed if cpu.vcpu is not None})
        return tuple(cpu for cpu in listed if cpu.number not in absent or cpu.online)

    async def _check_boot(self, deadline: float) -> None:
        """Forget what is known if the guest has booted anew without a reset of the VM, as by kexec."""
        boot_id = await self._read(_BOOT_ID, deadline)
        if boot_id and boot_id != self._boot_id:
            if self._boot_id:
                self._forget(None)
            self._boot_id = boot_id

    async def _read_places(self, numbers: Iterable[int], deadline: float) -> set[int]:
        """Read which vCPUs the guest's files name; return the numbers that pseries lists and that are not plugged."""
        from qmpvcpu.agent.numbering import place_file, read_place  # as in __init__

        absent = set()
        layout = self._layout()
        for number in numbers:
            path = place_file(layout.vm.arch, number)
            text = None if path is None else await self._read(path, deadline)
            if text is None:
                continue
            vcpu = read_place(self._layout(), number, text)
            if vcpu is None:
                if layout.vm.arch.startswith("ppc"):
                    absent.add(number)
                continue
            try:
                if self._numbering is not None:
                    self._numbering.told(number, vcpu)
            except ValueError as error:
                raise MalformedAnswerError(self.address, _LIST, str(error)) from None
        return absent

    async def _read(self, path: str, deadline: float) -> bytes | None:
        """Return what is in a file of the guest; None if it is not there, or the agent may not read files."""
        if not self._reads_files:
            return None
        try:
            return await self._door.read_file(path, timeout=_rest(deadline))
        except AgentForbiddenError:
            self._reads_files = False
        except GuestRefusedError:
            pass
        return None

    async def _release(self, deadline: float) -> str:
        """Return the release of the guest's Linux; "" where that is not told, or it is none."""
        if self._os is None:
            try:
                await self._read_os(deadline)
            except (AgentForbiddenError, GuestRefusedError):
                self._os = GuestOs()
        return "" if self._os is None or self._os.is_windows else self._os.kernel

    async def _read_os(self, deadline: float) -> GuestOs:
        self._os = await self._door.os(timeout=_rest(deadline))
        self._on_os(self._os)
        return self._os

    async def _set(self, given: int | str | Iterable[int], timeout: float, *, online: bool) -> VcpuMap:
        wanted = _ids(given)
        what = "online" if online else "offline"
        with self._traced(f"guest.set_{what}", vcpus=str(wanted)):
            return await self._set_in_turn(wanted, timeout, what, online=online)

    async def _set_in_turn(self, wanted: VcpuMap, timeout: float, what: str, *, online: bool) -> VcpuMap:
        hint = "" if online else WITHOUT_AGENT
        async with self._in_turn(timeout, describe(what, wanted), hint=hint) as deadline:
            by_vcpu = await self._list_with(wanted, deadline, waits=online)
            todo = [each for each in wanted if by_vcpu[each].online is not online]
            if fixed := [each for each in todo if not online and not by_vcpu[each].can_offline]:
                why = "its system does not let this CPU go offline"
                raise GuestRefusedError(
                    self.address, why, number=by_vcpu[fixed[0]].number, ids=VcpuMap(fixed), done=VcpuMap(), what=what
                )
            if todo:
                numbers = {by_vcpu[each].number: each for each in todo}
                await self._tell(numbers, deadline, online=online)
                try:
                    listed = await self._list(deadline)
                except GuestAgentError as error:
                    error.outcome = Outcome.CHANGED  # only the look at what was done has failed
                    raise
                shown = {cpu.vcpu for cpu in listed if cpu.online is online}
                if failed := [each for each in todo if each not in shown]:
                    why = "it claims success, but its list does not show it"
                    done = VcpuMap(each for each in todo if each in shown)
                    refusal = GuestRefusedError(self.address, why, ids=VcpuMap(failed), done=done, what=what)
                    refusal.outcome = Outcome.UNKNOWN
                    raise refusal
            return VcpuMap(todo)

    async def _list_with(self, wanted: VcpuMap, deadline: float, *, waits: bool) -> dict[int | None, GuestVcpu]:
        """Return the guest's CPUs by vCPU; *waits* for those *wanted* that were just plugged, if they are to come."""
        pause = _FIRST_PAUSE_S
        while True:
            by_vcpu = {cpu.vcpu: cpu for cpu in await self._list(deadline)}
            missing = wanted - {each for each in by_vcpu if each is not None}
            # The guest lists a CPU before it has made its files and acknowledged the plug: either tells which it is.
            settles = self._is_unanswered() if None in by_vcpu else waits
            may_come = settles and missing <= self._layout().enabled
            if not missing or not may_come or _rest(deadline) <= pause:
                self._check_known(wanted, by_vcpu, online=waits)
                return by_vcpu
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _is_unanswered(self) -> bool:
        return self._numbering is not None and bool(self._numbering.unanswered(self._layout()))

    async def _tell(self, numbers: dict[int, int], deadline: float, *, online: bool) -> None:
        """Have CPUs go online or offline; *numbers* has their vCPUs. The agent ends in silence before a refusal."""
        left = list(numbers)
        while left:
            try:
                count = await self._door.set_cpus(dict.fromkeys(left, online), timeout=_rest(deadline))
            except GuestRefusedError as error:
                done = VcpuMap(vcpu for number, vcpu in numbers.items() if number not in left)
                raise GuestRefusedError(
                    self.address,
                    error.reason,
                    errno=error.errno,
                    number=left[0],
                    ids=VcpuMap([numbers[left[0]]]),
                    done=done,
                    what="online" if online else "offline",
                ) from None
            if count == 0:
                raise MalformedAnswerError(self.address, "guest-set-vcpus", "nothing was done, and no error says why")
            left = left[count:]

    def _check_known(self, wanted: VcpuMap, by_vcpu: Mapping[int | None, GuestVcpu], *, online: bool) -> None:
        layout = self._layout()
        if unknown := VcpuMap(each for each in wanted if each >= layout.max):
            raise GuestNumberUnknownError(self.address, unknown, f"this machine has 0 to {layout.max - 1}")
        if absent := wanted - layout.enabled:
            hint = "plug it first" if online else ""
            raise GuestNumberUnknownError(self.address, absent, "it is not plugged", hint=hint)
        missing = wanted - {each for each in by_vcpu if each is not None}
        if missing and None in by_vcpu:
            why = "nothing says which of the guest's CPUs it is"
            hint = "let the agent read files (guest-file-open, guest-file-read, guest-file-close)"
            if self._reads_files:
                hint = "the guest's files do not say it; a reset while this is attached tells more"
            raise GuestNumberUnknownError(self.address, missing, why, hint=hint)
        if missing:
            hint = "it cannot be online there, so unplug it without offline_first=True"
            if online:
                hint = "the guest may still start it, or its kernel takes no more CPUs: look into its log"
            raise GuestNumberUnknownError(self.address, missing, "the guest does not list it", hint=hint)

    async def _ask_qemu(self, path: str) -> "QemuSays":
        from qmpvcpu.agent.answers import parse_port  # as in __init__
        from qmpvcpu.agent.door import QemuSays

        execute = self._monitor().execute
        chardevs, status = await asyncio.gather(execute("query-chardev"), execute("query-status"))
        run_state = parse_status("query-status", status)
        return QemuSays(parse_port(chardevs, path), "" if run_state == "running" else run_state)


def _ids(given: int | str | Iterable[int]) -> VcpuMap:
    ids = VcpuMap.parse(given) if isinstance(given, str) else VcpuMap([given] if isinstance(given, int) else given)
    if not ids:
        raise InvalidMapError(given if isinstance(given, str) else "", "it names no vCPU")
    return ids


def _rest(deadline: float) -> float:
    return max(0.0, deadline - asyncio.get_running_loop().time())
