"""What a removal's state and a step's end mean for callers: verdicts and errors."""

from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.engine.steprun import EJECTED, LEFT_OFFLINE, NOT_RUNNING, StepRun
from qmpvcpu.engine.transition import Transition
from qmpvcpu.errors import (
    CommandRejectedError,
    MonitorLostError,
    MonitorTimeoutError,
    Outcome,
    OutcomeUnknownError,
    PlacementError,
    PlugUndoneError,
    QmpVcpuError,
    RecordError,
    TransitionError,
    UnplugPendingError,
    UnplugRefusedError,
    UnprovenError,
)
from qmpvcpu.model.options import Proof
from qmpvcpu.model.transition import Action, TransitionReport
from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Refused, Rejected, Unknown, Unplugged
from qmpvcpu.model.vm import X86

_NEVER_ACKNOWLEDGED = "it is still booting, or takes no CPUs while it runs"
_NEVER_STARTED = (
    "usual causes: the guest is still booting, was built without CPU hotplug or booted with maxcpus= or nr_cpus=,"
    " sees no hypervisor (kvm=off, or TCG under newer Linux), or leaves new CPUs offline"
)

_LEFT_OFFLINE = "online=True has the agent bring it online, and so does vm.guest.set_online"

UnplugVerdict = Unplugged | Refused | Pending

# QEMU's texts change between versions: they choose a hint, and nothing else depends on them.
_OF_SMM = "with SMI wasn't enabled by firmware"  # hw/acpi/ich9.c, ich9_pm_device_pre_plug_cb and _unplug_request_cb
_OF_HELD_ID = "Duplicate device ID"  # system/qdev-monitor.c, qdev_set_id
_NOT_NEGOTIATED = (
    "the VM's firmware uses SMM and has not agreed to CPU hotplug with this machine type, so asking again does not"
    " help: start the VM with a newer machine type (q35 of QEMU 5.2 or later) or newer firmware, or without SMM"
)


def verdict_on(removal: Removal) -> Unplugged | Refused | None:
    """Return the guest's answer to *removal*, or None while there is none."""
    if removal.state is State.UNPLUGGED:
        return Unplugged(removal.ids, seconds=removal.seconds)
    if removal.state is State.REFUSED:
        return Refused(removal.ids, removal.code, removal.reason, seconds=removal.seconds)
    return None


def error_of_removal(removal: Removal) -> QmpVcpuError:
    """Return the error for a caller who waits for *removal*, which ended without an answer of the guest's."""
    if removal.rejection is not None:
        return _rejected(Action.UNPLUG, removal.rejection, {"execute": "device_del"})
    why = f"{removal.state.value}; vCPU {removal.ids} is as layout says"
    return MonitorLostError(why, outcome=Outcome.UNKNOWN)


def error_of(transition: Transition, report: TransitionReport | None) -> QmpVcpuError | None:
    """Return the error that *transition* is for its caller, or None if what was asked for is done.

    Args:
        transition: One that has ended.
        report: Its report; None for a single step.
    """
    if transition.not_begun is not None:
        return transition.not_begun
    error = _error_of_step(transition) if report is None else _error_of_map(transition, report)
    if error is None and transition.unrecorded is not None:
        unrecorded = transition.unrecorded
        why = f"{unrecorded.why}; {_done(transition)}, and not recorded"
        error = _caused(RecordError(unrecorded.path, why, outcome=Outcome.CHANGED), unrecorded)
    return error


def _error_of_map(transition: Transition, report: TransitionReport) -> QmpVcpuError | None:
    if transition.is_as_asked(report.outcome):
        return None
    return _caused(TransitionError(report), transition.unwritten or transition.unrecorded)


def _error_of_step(transition: Transition) -> QmpVcpuError | None:
    for run in transition.runs:
        error = _error_of_run(run, transition)
        if error is not None:
            return error
    return transition.unwritten


def errors_of_steps(transition: Transition) -> dict[StepRun, QmpVcpuError]:
    """Return why steps of *transition*, which has ended, or what undid them, are not as wanted; for traces."""
    errors = {run: _error_of_run(run, transition) for run in (*transition.runs, *transition.undoing.values())}
    return {run: error for run, error in errors.items() if error is not None}


def _error_of_run(run: StepRun, transition: Transition) -> QmpVcpuError | None:
    ids, action = run.step.ids, Action.PLUG if run.plugs else Action.UNPLUG
    options = transition.change.options
    timeout = options.timeout if run.undoes is None else options.undo_timeout
    error: QmpVcpuError | None = None
    match run.verdict:
        case Plugged():
            error = _error_of_plugged(run, run.verdict, transition)
        case Unplugged() if run.path is not None:  # it was plugged, and has left again
            error = PlugUndoneError(ids, by_second_removal=run.reason == EJECTED)
        case Pending() | None if transition.lost is not None:
            sent = run.verdict is not None or run.sent_at > 0
            error = lost_for(transition.lost, outcome=Outcome.UNKNOWN if sent else Outcome.UNCHANGED)
        case Pending(acknowledged=acknowledged):
            error = UnplugPendingError(ids, timeout, acknowledged=acknowledged)
        case Refused(code=code, reason=reason, by_agent=by_agent) if run.step.action is Action.UNPLUG:
            error = UnplugRefusedError(ids, code, reason, by_agent=by_agent)
        case Rejected():
            command = "device_add" if run.plugs else "device_del"
            error = _rejected(action, run.verdict, {"execute": command, "arguments": dict(run.arguments)})
        case Denied():
            error = run.error
        case Unknown():
            error = _caused(OutcomeUnknownError(action.value, ids, run.verdict.why), _cause(run, transition))
    if error is not None and run.left_offline and not str(error).endswith(run.left_offline):
        error.args = (f"{error}; {run.left_offline}",)
    return error


def _error_of_plugged(run: StepRun, plugged: Plugged, transition: Transition) -> QmpVcpuError | None:
    if run.taken_out is not None and transition.lost is not None and not run.taken_out.was_tried:
        more = f"; vCPU {run.step.ids} is plugged, and where its threads run is {run.unplaced}"
        return lost_for(transition.lost, more, outcome=Outcome.CHANGED)
    if run.taken_out is not None:
        return PlacementError(run.step.ids, run.unplaced, taken_out=_is_out(run.taken_out))
    return None if run.missing is None else _unproven(run, plugged, run.missing, transition)


def _is_out(run: StepRun) -> bool | None:
    """Return whether *run* has taken its vCPUs out; None if that is unknown."""
    if isinstance(run.verdict, Pending | Unknown):
        return None
    return isinstance(run.verdict, Unplugged)


def _unproven(run: StepRun, plugged: Plugged, missing: Proof, transition: Transition) -> QmpVcpuError:
    if transition.lost is not None:  # the guest may have done it a moment later
        more = f"; vCPU {run.step.ids} is plugged, and was not {missing.value} until then"
        return lost_for(transition.lost, more, outcome=Outcome.CHANGED)
    reached = max(run.proofs, default=Proof.PRESENT)
    if missing is not Proof.ACKNOWLEDGED:
        reason, hint = f"{run.reason}, after {run.seconds:.3g} s", _NEVER_STARTED
        if run.no_agent:
            hint = ""  # the reason says it
        elif run.reason == LEFT_OFFLINE:
            hint = _LEFT_OFFLINE
        elif run.reason == NOT_RUNNING:
            hint = "cont lets it run"
    elif plugged.code is None:
        reason, hint = f"{plugged.reason} within {transition.change.options.timeout:g} s", _NEVER_ACKNOWLEDGED
    else:
        reason, hint = plugged.reason, ""
    return UnprovenError(run.step.ids, missing, reached, reason, code=plugged.code, hint=hint)


def _rejected(action: Action, verdict: Rejected, message: dict[str, object]) -> CommandRejectedError:
    return CommandRejectedError(
        verdict.error_class, verdict.desc, message, action=action.value, ids=verdict.ids, hint=verdict.hint
    )


def _done(transition: Transition) -> str:
    """Say what is done."""
    if transition.is_map:
        return "what was wanted is reached"
    if transition.change.config is not None:
        return f"{transition.change.subject} is done, at the next boot too"
    words = [f"vCPU {run.step.ids} is {'plugged' if run.plugs else 'unplugged'}" for run in transition.runs]
    return " and ".join(words) or f"{transition.change.subject} is done"


def lost_for(lost: MonitorLostError, more: str = "", *, outcome: Outcome | None = None) -> MonitorLostError:
    """Return an error of its own for one that waited when the connection was *lost*."""
    return MonitorLostError(f"{lost.why}{more}", hung_up=lost.hung_up, outcome=outcome)


def _caused(error: QmpVcpuError, cause: BaseException | None) -> QmpVcpuError:
    error.__cause__ = cause
    return error


def _cause(run: StepRun, transition: Transition) -> Exception:
    """Return what kept QEMU's reply to *run* from coming."""
    if run.cause is not None:
        return run.cause
    if transition.lost is not None:
        return lost_for(transition.lost)
    return MonitorTimeoutError("device_add" if run.plugs else "device_del", transition.reply_timeout)


def hint_of_plug(run: StepRun, desc: str, *, slot_path: str | None, is_taken: bool) -> str:
    """Say what the rejection *desc* of a plug means, judging by a look after it."""
    if slot_path is not None:
        return f"the slot is occupied meanwhile, by {slot_path}"
    if is_taken:
        return f"another device is {run.path}: ask again, and the vCPU gets another id"
    if _OF_SMM in desc:
        return _NOT_NEGOTIATED
    if _OF_HELD_ID in desc:
        # Until QEMU has joined the thread of a vCPU, its slot is empty and its id is taken.
        return "the slot is empty; if a vCPU has just left it, QEMU may hold its id for a moment: ask again"
    return "the slot is empty"


def hint_of_unplug(rejection: Rejected, *, path: str | None, arch: str) -> str:
    """Say what *rejection* of an unplug means; a look after it shows the CPU at *path*, or nothing."""
    if path is None:
        return "it is gone already"
    if rejection.error_class == "DeviceNotFound":
        return (
            f"it is still plugged, as {path}, and device_del finds no device of that name: the id that another client"
            " gave it cannot be named, so it stays until the VM is started anew"
        )
    if _OF_SMM in rejection.desc:
        return _NOT_NEGOTIATED
    if arch in X86:
        return (
            "it is still plugged; most likely the guest's ACPI hotplug is not up yet (firmware, early boot, or no"
            " ACPI): ask again once the guest runs"
        )
    return "it is still plugged"
