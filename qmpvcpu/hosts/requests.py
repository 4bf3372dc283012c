"""What an agent can be asked for. Its answers are the documents that the commands print with ``--json``."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeVar

from qmpvcpu.documents.failures import code_of, error_json
from qmpvcpu.documents.form import NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.documents.plans import plan_json
from qmpvcpu.documents.readings import statistics_json
from qmpvcpu.documents.steps import unplug_json
from qmpvcpu.errors import PlacementError, QmpVcpuError, RequestRefusedError, TooLongError, UnprovenError
from qmpvcpu.fleet import VmResult
from qmpvcpu.hosts.hosted import HostedVm
from qmpvcpu.hosts.outbox import Outbox
from qmpvcpu.hosts.policy import AgentPolicy
from qmpvcpu.model.codec import from_json
from qmpvcpu.model.hosts import MOST_BYTES, Operation, VmKey, name_of
from qmpvcpu.model.options import Recovery
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Denied, Unplugged, verdict_of
from qmpvcpu.model.wish import WishOptions, check_target
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.one_step import PlugClock, joins

_T = TypeVar("_T")

# How many VMs are read at a time.
_AT_A_TIME: Final = 16
# What is around a VM in a list.
_FRAME_BYTES: Final = 4096


@dataclass(frozen=True)
class ListRequest:
    """Which VMs a host has, and their layouts.

    Attributes:
        after: Begin after the VM with this name; None: with the first.
        vm: Only the VM with this name; None: all.
        fresh: Whether to read each VM again; otherwise the answer has what is known from events.
    """

    closed: ClassVar[bool] = True

    after: str | None = None
    vm: str | None = None
    fresh: bool = False


@dataclass(frozen=True)
class MapRequest:
    """The vCPUs that a VM should have: a map, or a count.

    Attributes:
        vm: Its name.
        map: The vCPUs.
        count: How many.
        include_boot: Whether a count may take boot vCPUs out.
        options: How.
    """

    closed: ClassVar[bool] = True

    vm: str
    map: VcpuMap | None = None
    count: int | None = None
    include_boot: bool = False
    options: WishOptions = field(default_factory=WishOptions)

    def check_foreign(self) -> None:
        """Raise ValueError if it contradicts itself."""
        check_target(self.map, self.count, include_boot=self.include_boot)


@dataclass(frozen=True)
class VcpuRequest:
    """vCPUs to plug or unplug, one by one.

    Attributes:
        vm: The VM's name.
        ids: Which; if empty, a plug takes the first free one.
        options: How.
    """

    closed: ClassVar[bool] = True

    vm: str
    ids: tuple[int, ...] = ()
    options: WishOptions = field(default_factory=WishOptions)


@dataclass(frozen=True)
class VmRequest:
    """A request that names a VM and nothing else."""

    closed: ClassVar[bool] = True

    vm: str


@dataclass(frozen=True)
class RecoverRequest:
    """What to do with a VM's interrupted change."""

    closed: ClassVar[bool] = True

    vm: str
    how: Recovery = Recovery.REPORT


@dataclass(frozen=True)
class StatisticsRequest:
    """What a VM's vCPUs have done; *kvm* names KVM's counters, null for all of them."""

    closed: ClassVar[bool] = True

    vm: str
    kvm: tuple[str, ...] | None = None


class _PartlyDoneError(QmpVcpuError):
    """One of several steps failed; *steps* has the finished ones, and the failed one if anything was sent for it."""

    def __init__(self, error: QmpVcpuError, steps: list[dict[str, Any]]) -> None:
        super().__init__(str(error))
        self.error = error
        self.steps = steps


class RequestDesk:
    """Answers requests.

    Args:
        host: The host.
        vms: All of its VMs, by name.
        policy: What the agent may do.
        outbox: Takes the audit: who asked for what.
        most_bytes: The longest answer that the server takes.
        refresh: Reads the VMs with the given names again.
    """

    def __init__(
        self,
        host: str,
        vms: Mapping[str, HostedVm],
        policy: AgentPolicy,
        outbox: Outbox,
        *,
        most_bytes: int,
        refresh: Callable[[list[HostedVm]], Awaitable[None]],
    ) -> None:
        self._host = host
        self._vms = vms
        self._policy = policy
        self._outbox = outbox
        self._most_bytes = most_bytes
        self._refresh = refresh
        self._work: Final[Mapping[Operation, Callable[[bytes], Awaitable[dict[str, Any]]]]] = {
            Operation.LIST: self._list,
            Operation.PLAN: self._plan,
            Operation.STATISTICS: self._statistics,
            Operation.SET: self._set,
            Operation.COUNT: self._set,
            Operation.PLUG: self._plug,
            Operation.UNPLUG: self._unplug,
            Operation.CANCEL: self._cancel,
            Operation.RECOVER: self._recover,
        }

    async def answer(self, operation: Operation, subject: str, request: bytes) -> bytes:
        """Return the document that answers *request*, which came on *subject*; a failure is a document too."""
        vm = _vm_in(request)
        try:
            who = name_of(subject.rpartition(".")[2])
        except ValueError as error:
            refused = RequestRefusedError(f"it is not known who asks: the end of the subject is {error}")
            return json.dumps(self._failure(refused, vm)).encode()
        audited = not operation.only_reads and vm in self._vms
        key = VmKey(self._host, vm)
        if audited:
            asked = json.loads(request, parse_constant=str)  # NaN, which Python reads and writes, is no JSON
            self._outbox.requested(key, operation.value, who, asked)
        try:
            content = await self._carry_out(operation, request, vm)
        except BaseException as error:
            if audited:  # who reads the stream would wait for an end that nobody tells
                stopped = isinstance(error, asyncio.CancelledError)
                why = "its agent was stopped meanwhile" if stopped else f"its agent failed: {error!r}"
                self._outbox.replied(key, operation.value, who, NO_ANSWER, why)
            raise
        if audited:
            why = (content.get("error") or {}).get("message", "")
            self._outbox.replied(key, operation.value, who, content["code"], why)
        answer = json.dumps(content).encode()
        if len(answer) > self._most_bytes:
            why = (
                f"the answer has {len(answer):,} bytes, and the server takes {self._most_bytes:,}: raise max_payload"
            )
            answer = json.dumps(self._failure(RequestRefusedError(why), vm)).encode()
        return answer

    async def _carry_out(self, operation: Operation, request: bytes, vm: str) -> dict[str, Any]:
        """Return the document that says what came of *request*."""
        try:
            if len(request) > MOST_BYTES:
                raise RequestRefusedError(f"the request has {len(request):,} bytes: {MOST_BYTES:,} are read")
            if why := self._policy.refusal(operation):
                raise RequestRefusedError(why)
            return document(code=REACHED, **await self._work[operation](request))
        except QmpVcpuError as error:
            return self._failure(error, vm)

    def _failure(self, error: QmpVcpuError, vm: str) -> dict[str, Any]:
        done: dict[str, Any] = {}
        if isinstance(error, _PartlyDoneError):
            done, error = {"steps": error.steps}, error.error
        code = code_of(error)
        if code == NOT_SENT and done.get("steps"):
            code = NOT_REACHED  # this step was not sent, but earlier ones were
        content = document(code=code, error=error_json(error), **done)
        report = getattr(error, "report", None)
        if report is not None:
            content |= report.to_json()
        hosted = self._vms.get(vm)
        if hosted is not None and hosted.vm is not None:
            content |= state_json(hosted.vm.layout)
        return content

    def _hosted(self, operation: Operation, name: str) -> tuple[HostedVm, VcpuController]:
        """Return the VM with this *name*.

        Raises:
            RequestRefusedError: There is none, or it is not served.
            QmpVcpuError: It is not attached: why.
        """
        if why := self._policy.refusal(operation, name):
            raise RequestRefusedError(why)
        hosted = self._vms.get(name)
        if hosted is None:
            raise RequestRefusedError(f"no VM {name!r} on {self._host}: ask for a list")
        if hosted.vm is None:
            if isinstance(hosted.error, QmpVcpuError):
                raise hosted.error
            raise RequestRefusedError(f"{hosted.key} is not attached: {hosted.error or 'its QEMU is gone'}")
        return hosted, hosted.vm

    async def _list(self, request: bytes) -> dict[str, Any]:
        asked = _read(ListRequest, request)
        if asked.vm is not None and asked.vm not in self._vms:
            raise RequestRefusedError(f"no VM {asked.vm!r} on {self._host}: ask for a list of all")
        names = sorted(name for name in self._vms if self._policy.covers(name) and name > (asked.after or ""))
        wanted = [self._vms[name] for name in names if asked.vm in (None, name)]
        rows: list[dict[str, Any]] = []
        room = self._most_bytes // 2
        for place in range(0, len(wanted), _AT_A_TIME):
            some = wanted[place : place + _AT_A_TIME]
            if asked.fresh:
                await self._refresh(some)
            for hosted in some:
                row = hosted.result().to_json(whole=True)
                size = len(json.dumps(row))
                if size > self._most_bytes - _FRAME_BYTES:
                    error = TooLongError(f"what {hosted.key} has", size, self._most_bytes)
                    row = VmResult(hosted.address, hosted.key.vm, None, None, error, 0.0).to_json(whole=True)
                    size = len(json.dumps(row))
                room -= size
                if room < 0 and rows:
                    return {"host": self._host, "vms": rows, "next": rows[-1]["name"]}
                rows.append(row)
        return {"host": self._host, "vms": rows, "next": None}

    async def _plan(self, request: bytes) -> dict[str, Any]:
        asked = _read(MapRequest, request)
        _, vm = self._hosted(Operation.PLAN, asked.vm)
        options = asked.options.given()
        if asked.map is not None:
            plan = vm.plan(asked.map, **options)
        else:
            plan = vm.plan_count(asked.count or 0, include_boot=asked.include_boot, **options)
        return {**plan_json(plan), **state_json(vm.layout)}

    async def _set(self, request: bytes) -> dict[str, Any]:
        asked = _read(MapRequest, request)
        hosted, vm = self._hosted(Operation.SET if asked.count is None else Operation.COUNT, asked.vm)
        options = asked.options.given()
        async with hosted.turn:
            if asked.map is not None:
                report = await vm.set_map(asked.map, **options)
            else:
                report = await vm.set_count(asked.count or 0, include_boot=asked.include_boot, **options)
        return {**report.to_json(), **state_json(vm.layout)}

    async def _plug(self, request: bytes) -> dict[str, Any]:
        asked = _read(VcpuRequest, request)
        _, vm = self._hosted(Operation.PLUG, asked.vm)

        async def plug(vcpu: int | None, steps: list[dict[str, Any]]) -> None:
            async with PlugClock(vm.events()) as clock:
                try:
                    ids = await vm.plug(vcpu, **asked.options.given())
                except (UnprovenError, PlacementError) as error:
                    steps.append(clock.step_json(vm.layout, error))
                    raise
            steps.append(clock.step_json(vm.layout, ids))

        return await _one_by_one(vm, asked.ids or (None,), plug)

    async def _unplug(self, request: bytes) -> dict[str, Any]:
        asked = _read(VcpuRequest, request)
        if not asked.ids:
            raise RequestRefusedError("which vCPUs? 'ids' is empty")
        _, vm = self._hosted(Operation.UNPLUG, asked.vm)

        async def unplug(vcpu: int, steps: list[dict[str, Any]]) -> None:
            joined, started = joins(vm, vcpu), time.monotonic()
            try:
                ids = await vm.unplug(vcpu, **asked.options.given())
            except QmpVcpuError as error:
                verdict = verdict_of(error)
                if verdict is not None and not isinstance(verdict, Denied):
                    steps.append(unplug_json(verdict, joined=joined))
                raise
            steps.append(unplug_json(Unplugged(ids, time.monotonic() - started), joined=joined))

        return await _one_by_one(vm, asked.ids, unplug)

    async def _cancel(self, request: bytes) -> dict[str, Any]:
        _, vm = self._hosted(Operation.CANCEL, _read(VmRequest, request).vm)
        report = await vm.cancel()
        return {"cancelled": report is not None, **(report.to_json() if report else {}), **state_json(vm.layout)}

    async def _recover(self, request: bytes) -> dict[str, Any]:
        asked = _read(RecoverRequest, request)
        hosted, vm = self._hosted(Operation.RECOVER, asked.vm)
        async with hosted.turn:
            report = await vm.recover(asked.how)
        return {"interrupted": report is not None, **(report.to_json() if report else {}), **state_json(vm.layout)}

    async def _statistics(self, request: bytes) -> dict[str, Any]:
        asked = _read(StatisticsRequest, request)
        _, vm = self._hosted(Operation.STATISTICS, asked.vm)
        return statistics_json(await vm.statistics(kvm=asked.kvm))


async def _one_by_one(
    vm: VcpuController, ids: Sequence[_T], work: Callable[[_T, list[dict[str, Any]]], Awaitable[None]]
) -> dict[str, Any]:
    """Do *work* on each of *ids* in turn; it adds its step. Stop at the first failure."""
    steps: list[dict[str, Any]] = []
    for each in ids:
        try:
            await work(each, steps)
        except QmpVcpuError as error:
            raise _PartlyDoneError(error, steps) from error
    return {"steps": steps, **state_json(vm.layout)}


def _read(kind: type[_T], request: bytes) -> _T:
    """Return what *request* asks for.

    Raises:
        RequestRefusedError: It cannot be read.
    """
    try:
        return from_json(kind, request)
    except ValueError as error:
        raise RequestRefusedError(f"the request cannot be read: {error}") from error


def _vm_in(request: bytes) -> str:
    """Return which VM *request* names, or "" if it cannot be read, for example because it is too long."""
    if len(request) > MOST_BYTES:
        return ""
    try:
        vm = json.loads(request)["vm"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return vm if isinstance(vm, str) else ""
