"""Strategies for what documents are made of: every error of the library, each with any evidence."""

from typing import Any

from hypothesis import strategies as st

from qmpvcpu import errors
from qmpvcpu.domainxml import DomainRule, RuleStage
from qmpvcpu.errors import DenialReason, Outcome, QmpVcpuError, naming_file
from qmpvcpu.model.options import Proof
from qmpvcpu.model.wish import WishPhase
from qmpvcpu.planning.compatibility import Difference, DifferenceKind, Severity
from tests.model.values import maps, maybe, reports

__all__ = ["ERRORS", "any_json", "every_error"]

texts = st.text(max_size=12)
words = st.none() | texts
actions = st.sampled_from(["plug", "unplug"])
codes = st.none() | st.integers(0, 255)
seconds = st.floats(0, 1e6)
outcomes = st.sampled_from(Outcome)
reasons = st.sampled_from(DenialReason)
any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
differences = st.lists(
    st.builds(Difference, st.sampled_from(DifferenceKind), texts, texts, st.sampled_from(Severity), texts, maps),
    max_size=3,
)
denied = (st.sampled_from(["plug", "unplug", "count"]), maps, reasons, texts)
agent: dict[str, Any] = {"hint": texts, "outcome": outcomes}


def concerning(kind: Any, *args: Any, **kwargs: Any) -> "st.SearchStrategy[Any]":
    """An error of the guest's agent, which has been told what the agent was asked for or not."""

    def concern(error: Any, about: str | None, timeout: float | None, hint: str) -> Any:
        if about is not None:
            error.concern(about, timeout=timeout, hint=hint)
        return error

    return st.builds(concern, st.builds(kind, *args, **kwargs), words, st.none() | seconds, texts)


def in_file(error: errors.DomainXmlError, path: str | None) -> errors.DomainXmlError:
    """*error*, which names the file that its document was read from, if that is known."""
    if path is not None:
        try:
            with naming_file(path):
                raise error
        except errors.DomainXmlError:
            pass
    return error


of_xml = st.builds(errors.DomainXmlError, texts, line=st.none() | st.integers(1, 10**6))
of_rule = st.builds(
    errors.DomainRuleError,
    st.sampled_from(DomainRule),
    element=texts,
    attribute=words,
    value=words,
    line=st.none() | st.integers(1, 10**6),
    stage=st.sampled_from(RuleStage),
    detail=texts,
    libvirt_says=st.text(max_size=300),
)
placement = st.builds(
    errors.PlacementError,
    maps,
    texts,
    action=st.sampled_from(["plug", "placing", errors.LOOK]),
    taken_out=maybe,
    now=texts,
)

ERRORS: dict[type[QmpVcpuError], st.SearchStrategy[Any]] = {
    errors.QmpVcpuError: st.builds(errors.QmpVcpuError, texts),
    errors.InvalidMapError: st.builds(errors.InvalidMapError, any_json, texts),
    errors.DomainXmlError: st.builds(in_file, of_xml, words),
    errors.DomainRuleError: st.builds(in_file, of_rule, words),
    errors.PlanError: st.builds(errors.PlanError, texts),
    errors.StepDeniedError: st.builds(errors.StepDeniedError, *denied),
    errors.UnsupportedMachineError: st.builds(errors.UnsupportedMachineError, *denied, machine=texts),
    errors.ConfigDeniedError: st.builds(errors.ConfigDeniedError, texts, maps, reasons, texts),
    errors.StalePlanError: st.builds(errors.StalePlanError, maps, maps, texts),
    errors.ReplayMismatchError: st.builds(
        errors.ReplayMismatchError, st.lists(texts, max_size=3), outcome=st.sampled_from(Outcome)
    ),
    errors.MonitorError: st.builds(errors.MonitorError, texts),
    errors.MonitorConnectError: st.builds(
        errors.MonitorConnectError, texts, texts, reason=st.sampled_from(errors.Unreachable), hint=texts
    ),
    errors.MonitorTimeoutError: st.builds(errors.MonitorTimeoutError, texts, seconds, hint=texts),
    errors.MonitorLostError: st.builds(
        errors.MonitorLostError, texts, hung_up=st.booleans(), last_sent=words, outcome=st.none() | outcomes
    ),
    errors.MalformedReplyError: st.builds(errors.MalformedReplyError, texts, texts, any_json),
    errors.GuestAgentError: concerning(errors.GuestAgentError, texts, texts, **agent),
    errors.AgentConnectError: concerning(errors.AgentConnectError, texts, texts, **agent),
    errors.AgentSilentError: concerning(
        errors.AgentSilentError, texts, texts, timeout=seconds, port_open=maybe, **agent
    ),
    errors.AgentLostError: concerning(errors.AgentLostError, texts, texts, **agent),
    errors.AgentForbiddenError: concerning(errors.AgentForbiddenError, texts, texts, texts, hint=texts),
    errors.GuestRefusedError: concerning(
        errors.GuestRefusedError,
        texts,
        texts,
        ids=maps,
        done=maps,
        errno=texts,
        number=st.none() | st.integers(0, 999),
        what=texts,
    ),
    errors.MalformedAnswerError: concerning(
        errors.MalformedAnswerError, texts, words, texts, any_json, outcome=outcomes
    ),
    errors.GuestNumberUnknownError: concerning(errors.GuestNumberUnknownError, texts, maps, texts, hint=texts),
    errors.StepError: st.builds(errors.StepError, texts, action=st.none() | actions, ids=maps),
    errors.CommandRejectedError: st.builds(
        errors.CommandRejectedError,
        texts,
        texts,
        st.fixed_dictionaries(
            {"execute": texts}, optional={"arguments": st.dictionaries(texts, any_json, max_size=3)}
        ),
        ids=maps,
        action=st.none() | actions,
        hint=texts,
    ),
    errors.UnplugRefusedError: st.builds(errors.UnplugRefusedError, maps, codes, texts, by_agent=st.booleans()),
    errors.UnplugPendingError: st.builds(errors.UnplugPendingError, maps, seconds, acknowledged=st.booleans()),
    errors.UnprovenError: st.builds(
        errors.UnprovenError,
        maps,
        st.sampled_from(Proof),
        st.sampled_from(Proof),
        texts,
        code=codes,
        hint=texts,
    ),
    errors.PlacementError: placement,
    errors.PlugUndoneError: st.builds(errors.PlugUndoneError, maps, by_second_removal=st.booleans()),
    errors.OutcomeUnknownError: st.builds(errors.OutcomeUnknownError, actions, maps, texts),
    errors.TransitionError: st.builds(errors.TransitionError, reports),
    errors.HostError: st.builds(errors.HostError, texts),
    errors.HostBusyError: st.builds(errors.HostBusyError, texts),
    errors.ThreadGoneError: st.builds(errors.ThreadGoneError, st.integers(0, 2**22)),
    errors.SameVmError: st.builds(errors.SameVmError, texts, texts, same_socket=st.booleans()),
    errors.SameNameError: st.builds(errors.SameNameError, texts, st.tuples(texts, texts)),
    errors.HostsError: st.builds(errors.HostsError, texts),
    errors.ServerConnectError: st.builds(errors.ServerConnectError, texts, texts, texts),
    errors.ServerLostError: st.builds(errors.ServerLostError, texts, texts, maybe_done=st.booleans()),
    errors.UnfitServerError: st.builds(errors.UnfitServerError, texts, texts, texts),
    errors.ServerForbiddenError: st.builds(errors.ServerForbiddenError, texts, texts, texts),
    errors.StaleError: st.builds(errors.StaleError, texts, texts, st.integers(0, 2**40)),
    errors.LeaseTakenError: st.builds(errors.LeaseTakenError, texts, texts.map(str.encode)),
    errors.TooLongError: st.builds(errors.TooLongError, texts, st.integers(0, 2**40), st.integers(0, 2**40)),
    errors.RequestRefusedError: st.builds(errors.RequestRefusedError, texts),
    errors.NameTakenError: st.builds(errors.NameTakenError, texts, texts, st.lists(texts, max_size=3)),
    errors.HostSilentError: st.builds(errors.HostSilentError, texts, st.none() | seconds),
    errors.HostFailedError: st.builds(errors.HostFailedError, texts, texts),
    errors.CampaignError: st.builds(errors.CampaignError, texts, texts),
    errors.WishError: st.builds(errors.WishError, texts, st.sampled_from(WishPhase), texts, st.integers(0, 130)),
    errors.SocketDirectoryError: st.builds(errors.SocketDirectoryError, texts, texts),
    errors.MigrationError: st.builds(errors.MigrationError, texts),
    errors.TargetMismatchError: st.builds(errors.TargetMismatchError, texts, differences, differences),
    errors.TargetLostError: st.builds(errors.TargetLostError, texts, texts),
    errors.TakeBackError: st.builds(errors.TakeBackError, texts, texts, run_state=words, outcome=outcomes),
    errors.WaitTimeoutError: st.builds(errors.WaitTimeoutError, seconds, maps, maps),
    errors.RecordError: st.builds(errors.RecordError, texts, texts, outcome=outcomes),
    errors.RecordCorruptError: st.builds(errors.RecordCorruptError, texts, texts, outcome=outcomes),
    errors.RecordLockedError: st.builds(errors.RecordLockedError, texts, st.none() | st.integers(1, 2**22), texts),
}
"""One strategy for each class."""

every_error = st.sampled_from(sorted(ERRORS, key=lambda kind: kind.__name__)).flatmap(ERRORS.__getitem__)
