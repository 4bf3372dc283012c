"""Spans for OpenTelemetry: one for each change of vCPUs, and below it one for each of its steps.

``attach`` makes a ``Traces`` only in a program that has imported OpenTelemetry, so nobody else pays for the import.

- The span of a change begins with the call, in the caller's own context, and ends with its outcome: when all that was
  sent is taken in, even if the caller has gone before.
- The spans of its steps are made when it ends, of what the core knows then, with the times at which things happened.
  So they need no context of a task's, none stays open, and a step costs nothing while it is under way.
- The answer to a removal that nobody waited for any longer is a span of its own, below the step that asked for it.

OpenTelemetry's conventions have no words for VMs yet (``error.type`` and ``exception.*`` apart): the attributes are
our own, and begin with ``qmpvcpu.``.
"""

import asyncio
import contextlib
import functools
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Concatenate, Final, NamedTuple, ParamSpec, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, Status, StatusCode

from qmpvcpu import __version__
from qmpvcpu.engine.answers import verdict_on
from qmpvcpu.engine.messages import Change, Finished, Publish, Request, Result, Settle
from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.engine.steprun import StepRun
from qmpvcpu.errors import QmpVcpuError, TransitionError, printable
from qmpvcpu.events import (
    Disconnected,
    Event,
    InstanceChanged,
    Reconnected,
    UnplugRefused,
    VcpuUnplugged,
    VmReset,
    VmResumed,
    VmStopped,
)
from qmpvcpu.model.transition import Action, TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap, union
from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Refused, Rejected, Verdict

_log = logging.getLogger("qmpvcpu.traces")

_Attributes = dict[str, str | bool | int | float]
_P = ParamSpec("_P")
_T = TypeVar("_T")

_NS: Final = 1_000_000_000

# What happens to a VM while a change is under way, and may explain what became of it.
_TOLD: Final[Mapping[type[Event], str]] = {
    Disconnected: "disconnected",
    InstanceChanged: "instance changed",
    Reconnected: "reconnected",
    VmReset: "reset",
    VmResumed: "resumed",
    VmStopped: "stopped",
}

_REMOVED: Final[Mapping[State, str]] = {
    State.REQUESTED: "requested",
    State.WORKING: "working",
    State.UNPLUGGED: "gone",
    State.REFUSED: "refused",
    State.REJECTED: "rejected",
}


class _Open(NamedTuple):
    """The span of a change that has not ended.

    Attributes:
        span: It.
        context: For the spans below it.
        epoch: When the clock of the event loop was 0, in nanoseconds since 1970.
        events: What happened to it so far, and when.
    """

    span: Span
    context: Context
    epoch: int
    events: list[tuple[str, float]]


class _Asked(NamedTuple):
    """The step that has asked for a removal.

    Attributes:
        removal: It.
        step: The step's span.
        epoch: As in ``_Open``.
        ended_at: When the step ended without an answer, by the event loop's clock; None: it was answered.
    """

    removal: Removal
    step: SpanContext
    epoch: int
    ended_at: float | None


def _harmless(work: "Callable[Concatenate[Traces, _P], _T]") -> "Callable[Concatenate[Traces, _P], _T | None]":
    """Have *work* raise nothing: a program's own samplers and processors run in it, and the change has to go on."""

    @functools.wraps(work)
    def working(traces: "Traces", /, *args: _P.args, **given: _P.kwargs) -> _T | None:
        try:
            return work(traces, *args, **given)
        except Exception:  # noqa: BLE001 -- it may be anybody's: logged, and the change goes on
            _log.exception("no span could be made", extra={"vm": traces.vm})
            return None

    return working


class Traces:
    """Makes the spans of one VM's changes, by the tracer provider of the program.

    Args:
        vm: The VM's name.
        clock: That of the event loop, in seconds.

    Attributes:
        vm: Its name, printable.
    """

    def __init__(self, vm: str, clock: Callable[[], float]) -> None:
        self.vm = printable(vm)
        self._clock = clock
        self._tracer = trace.get_tracer("qmpvcpu", __version__)
        self._open: dict[Request, _Open] = {}
        self._asked: dict[int, _Asked] = {}  # the latest of each slot, by its first vCPU id

    @_harmless
    def begun(self, change: Change) -> None:
        """Begin the span of *change*; its caller's context is the current one."""
        now, options = self._clock(), change.options
        epoch = time.time_ns() - round(now * _NS)
        attributes: _Attributes = {
            "qmpvcpu.vm.name": self.vm,
            "qmpvcpu.on_failure": options.on_failure.value,
            "qmpvcpu.affect": options.affect.value,
            "qmpvcpu.proof": options.awaited_proof.value,
            "qmpvcpu.timeout": float(options.timeout),
        }
        if change.slot is not None:
            attributes["qmpvcpu.vcpus"] = str(change.slot)
        span = self._tracer.start_span(f"qmpvcpu.{change.call}", start_time=_at(epoch, now), attributes=attributes)
        if span.is_recording():
            self._open[change] = _Open(span, trace.set_span_in_context(span), epoch, [])

    @_harmless
    def finished(self, effect: Finished) -> None:
        """Make the spans of the steps of a transition that has ended."""
        change = self._open.get(effect.change)
        if change is None:
            return
        change.events.append(("planned", effect.began))
        if effect.stopped:
            change.span.set_attribute("qmpvcpu.cancelled", value=True)
        runs = (*effect.runs, *effect.undoing.values())
        unsent = union(run.step.ids for run in runs if run.verdict is None and not _begin(effect, run))
        if unsent:
            change.span.set_attribute("qmpvcpu.unsent", str(unsent))
        for run in runs:
            if began := _begin(effect, run):
                self._step(effect, change, run, began)

    def _step(self, effect: Finished, change: _Open, run: StepRun, began: float) -> None:
        ended, removal = run.ended_at or self._clock(), run.removal
        asked = self._asked.get(run.first)
        is_asked = asked is not None and asked.removal is removal
        span = self._tracer.start_span(
            f"qmpvcpu.step.{run.step.action.value}" if run.undoes is None else f"qmpvcpu.undo.{_undone(run)}",
            change.context,
            start_time=_at(change.epoch, began),
            attributes={"qmpvcpu.vm.name": self.vm, **_attributes_of(run)},
            links=[Link(asked.step)] if asked is not None and is_asked else None,
        )
        # What was before was asked for by somebody else, and what is after is a late answer.
        _add_events(span, change.epoch, (event for event in _events_of(run) if began <= event[1] <= ended))
        error = effect.errors.get(run)
        only_requests = effect.change.result is Result.REPORT and not effect.change.options.timeout
        if error is not None and not (only_requests and isinstance(run.verdict, Pending)):
            _fail(span, error, _at(change.epoch, ended))
        span.end(_at(change.epoch, ended))
        if removal is not None and not is_asked:
            answered = removal.state.is_final
            self._asked[run.first] = _Asked(
                removal, span.get_span_context(), change.epoch, None if answered else ended
            )

    @_harmless
    def settled(self, effect: Settle) -> None:
        """End the span of a change that has its outcome."""
        change = self._open.pop(effect.request, None)
        if change is None:
            return
        span, result, error = change.span, effect.result, effect.error
        now = _at(change.epoch, self._clock())
        _add_events(span, change.epoch, change.events)
        report = error.report if isinstance(error, TransitionError) else result
        if isinstance(report, TransitionReport):
            span.set_attribute("qmpvcpu.start", str(report.start))
            span.set_attribute("qmpvcpu.target", str(report.target))
            span.set_attribute("qmpvcpu.outcome", report.outcome.value)
            if report.config is not None:
                span.set_attribute("qmpvcpu.config.outcome", report.config.outcome.value)
        elif isinstance(result, VcpuMap):
            span.set_attribute("qmpvcpu.vcpus", str(result))
        elif result is None and error is None:  # nobody waited for it when its turn came
            span.set_attribute("qmpvcpu.cancelled", value=True)
        if error is not None:
            _fail(span, error, now)
        span.end(now)

    @contextlib.contextmanager
    def call(self, name: str, **told: str) -> Iterator[None]:
        """Have a span of a call that is no change, current while it lasts; *told* are attributes."""
        span = self._call_begun(name, told)
        if span is None:
            yield
            return
        error: BaseException | None = None
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._call_ended(span, error)

    @_harmless
    def _call_begun(self, name: str, told: Mapping[str, str]) -> Span:
        attributes = {f"qmpvcpu.{key}": printable(value) for key, value in told.items()}
        return self._tracer.start_span(f"qmpvcpu.{name}", attributes={"qmpvcpu.vm.name": self.vm, **attributes})

    @_harmless
    def _call_ended(self, span: Span, error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError):
            span.set_attribute("qmpvcpu.cancelled", value=True)
        elif error is not None and span.is_recording():
            _fail(span, error, time.time_ns())
        span.end()

    @_harmless
    def heard(self, effect: Publish) -> None:
        """Note what happens to the VM, and what the guest answers when nobody waits for it any longer."""
        for event in effect.events:
            if self._open and (name := _TOLD.get(type(event))) is not None:
                for change in self._open.values():
                    change.events.append((name, self._clock()))
            elif self._asked and isinstance(event, VcpuUnplugged | UnplugRefused):
                self._answered_late(event.ids.lowest)

    def _answered_late(self, first: int) -> None:
        asked = self._asked.get(first)
        verdict = None if asked is None else verdict_on(asked.removal)
        if asked is None or asked.ended_at is None or verdict is None:
            return
        self._asked[first] = asked._replace(ended_at=None)
        span = self._tracer.start_span(
            "qmpvcpu.late_answer",
            trace.set_span_in_context(NonRecordingSpan(asked.step), Context()),
            start_time=_at(asked.epoch, asked.ended_at),
            attributes={
                "qmpvcpu.vm.name": self.vm,
                "qmpvcpu.vcpus": str(asked.removal.ids),
                **_attributes_of_verdict(verdict),
            },
        )
        span.end(_at(asked.epoch, asked.removal.settled_at or self._clock()))


def _at(epoch: int, when: float) -> int:
    """Return *when*, by the event loop's clock, in nanoseconds since 1970."""
    return epoch + round(when * _NS)


def _add_events(span: Span, epoch: int, events: Iterable[tuple[str, float]]) -> None:
    for name, when in sorted(events, key=lambda event: event[1]):
        span.add_event(name, timestamp=_at(epoch, when))


def _begin(effect: Finished, run: StepRun) -> float:
    """Return when *run* was begun; 0 if it was not, or had been done by what this finishes."""
    if run.step.action is Action.KEEP and (run.sent_at or run.ended_at):
        return effect.began  # it waits for the guest from there on, and is sent only if the vCPU leaves
    return run.sent_at or run.ended_at


def _undone(run: StepRun) -> str:
    return (run if run.undoes is None else run.undoes).step.action.value


def _events_of(run: StepRun) -> Iterator[tuple[str, float]]:
    """Return the stages that *run* went through, and when."""
    removal, verdict = run.removal, run.verdict
    if run.step.action is Action.UNPLUG and run.step.asks_agent and run.sent_at:
        yield "leaving guest", run.sent_at
    if removal is not None:
        if run.ours:
            yield "sent", removal.requested_at
        elif run.step.action is Action.UNPLUG:
            yield "joined", run.sent_at
        yield from ((name, removal.since[state]) for state, name in _REMOVED.items() if state in removal.since)
    if run.plugs and run.arguments:
        yield "sent", run.sent_at
    yield from ((proof.value, when) for proof, when in run.proofs.items())
    if run.placed_at is not None:
        yield "placed", run.placed_at
    match verdict:
        case Pending():
            yield "pending", run.ended_at
        case Rejected() if run.plugs:
            yield "rejected", run.ended_at
        case Refused(by_agent=True):
            yield "refused", run.ended_at


def _attributes_of(run: StepRun) -> _Attributes:
    told: _Attributes = {"qmpvcpu.action": run.step.action.value, "qmpvcpu.vcpus": str(run.step.ids)}
    path = run.path or (run.removal.qom_path if run.removal is not None else run.step.qom_path)
    if path:
        told["qmpvcpu.qom_path"] = printable(path)
    if run.reason:
        told["qmpvcpu.reason"] = printable(run.reason)
    if run.unplaced:
        told["qmpvcpu.unplaced"] = printable(run.unplaced)
    if run.missing is not None:
        told["qmpvcpu.missing"] = run.missing.value
    if run.rejections:
        told["qmpvcpu.rejections"] = run.rejections
    if run.removal is not None and run.step.action is Action.UNPLUG:
        told["qmpvcpu.joined"] = not run.ours
    return told | _attributes_of_verdict(run.verdict)


def _attributes_of_verdict(verdict: Verdict | None) -> _Attributes:
    if verdict is None:
        return {}
    told: _Attributes = {"qmpvcpu.verdict": verdict.name.lower()}
    match verdict:
        case Refused(code=code, reason=reason) | Plugged(code=code, reason=reason):
            told |= {} if code is None else {"qmpvcpu.ost.code": code}
            told |= {"qmpvcpu.ost.reason": printable(reason)} if code else {}
        case Rejected():
            told["qmpvcpu.error_class"] = printable(verdict.error_class)
        case Denied():
            told["qmpvcpu.denied"] = verdict.reason.name.lower()
    return told


def _fail(span: Span, error: BaseException, when: int) -> None:
    shown = printable("".join(traceback.format_exception(error)), lines=True)
    span.record_exception(error, {"exception.stacktrace": shown}, timestamp=when)
    span.set_attribute("error.type", type(error).__qualname__)
    if isinstance(error, QmpVcpuError):
        span.set_attribute("qmpvcpu.vm.outcome", error.outcome.value)
    span.set_status(Status(StatusCode.ERROR, printable(str(error))))
