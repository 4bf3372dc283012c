"""The spans of changes on a real QEMU: whose they are, what they tell, and that each of them ends."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qmpvcpu
from qmpvcpu import (
    Affect,
    MonitorLostError,
    OnFailure,
    OutcomeUnknownError,
    Pending,
    Proof,
    Recovery,
    StepDeniedError,
    TransitionError,
    UnplugPendingError,
    UnplugRefusedError,
    VcpuController,
)
from qmpvcpu.events import Reconnected, UnplugAcknowledged, UnplugRefused, VcpuUnplugged
from qmpvcpu.testing import Behaviour, MicroGuest, QemuProcess, best_qemu
from tests.controller.vms import until
from tests.crash.proxy import Proxy
from tests.traces.spans import Spans, check_times, failed, id_of, stages, told

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

pytestmark = pytest.mark.qemu
BUSY = Behaviour.refusing(0x82)


def change_and_step(spans: Spans, call: str, step: str) -> tuple["ReadableSpan", "ReadableSpan"]:
    """The span of the only change by that call, and that of its only step."""
    change = spans.one(call)
    (below,) = spans.below(change)
    assert below.name == f"qmpvcpu.step.{step}"
    check_times(spans)
    return change, below


def stages_of_one(spans: Spans) -> Callable[[str], list[str]]:
    return lambda call: stages(spans.one(call))


async def test_a_plug_is_a_span_below_its_callers_and_its_step_one_below_that(spans: Spans) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="web") as vm:
        with spans.caller() as caller:
            await vm.plug(3, proof=Proof.ACKNOWLEDGED)
    change, step = change_and_step(spans, "plug", "plug")
    assert change.parent is not None
    assert change.parent.span_id == id_of(caller)
    assert told(change, "vm.name", "vcpus", "proof", "affect") == ["web", "3", "acknowledged", "live"]
    assert stages(change) == ["planned"]
    assert stages(step) == ["sent", "present", "acknowledged"]
    assert told(step, "action", "vcpus", "verdict", "ost.code", "qom_path") == [
        "plug",
        "3",
        "plugged",
        0,
        "/machine/peripheral/vcpu3",
    ]
    assert not failed(change)
    assert not failed(step)


async def test_an_unplug_tells_how_far_the_guest_got(spans: Spans) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        await vm.unplug(3)
    change, step = change_and_step(spans, "unplug", "unplug")
    assert change.parent is None
    assert [*stages(step)[:1], *stages(step)[-1:]] == ["sent", "gone"]
    assert "working" in stages(step)
    assert told(step, "verdict", "joined") == ["unplugged", False]


async def test_a_refusal_is_an_error_with_its_code_and_its_exception(spans: Spans) -> None:
    async with MicroGuest(behaviour=BUSY) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        with pytest.raises(UnplugRefusedError) as caught:
            await vm.unplug(3)
    change, step = change_and_step(spans, "unplug", "unplug")
    assert told(step, "verdict", "ost.code", "ost.reason") == ["refused", 0x82, "device is busy"]
    assert stages(step)[-2:] == ["refused", "exception"]
    for span in (change, step):
        assert failed(span)
        assert span.status.description == str(caught.value)
        assert (span.attributes or {})["error.type"] == "UnplugRefusedError"
        assert (span.events[-1].attributes or {})["exception.message"] == str(caught.value)


async def test_a_denied_change_fails_before_it_has_steps(spans: Spans) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        with pytest.raises(StepDeniedError):
            await vm.plug(0)
    change = spans.one("plug")
    assert failed(change)
    assert told(change, "vm.outcome") == ["unchanged"]
    assert spans.all == [change]


# Whole maps.


async def test_a_map_has_a_span_for_each_step(spans: Spans) -> None:
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.set_map("0,2-4")
    change = spans.one("set_map")
    check_times(spans)
    assert told(change, "start", "target", "outcome", "on_failure") == ["0-1", "0,2-4", "reached", "stop"]
    assert [(span.name, *told(span, "vcpus")) for span in spans.below(change)] == [
        ("qmpvcpu.step.plug", "2"),
        ("qmpvcpu.step.plug", "3"),
        ("qmpvcpu.step.plug", "4"),
        ("qmpvcpu.step.unplug", "1"),
    ]


async def test_a_map_that_is_reverted_shows_the_undoing(spans: Spans) -> None:
    async with MicroGuest(boot=3, behaviour=BUSY.for_slot(1)) as guest, qmpvcpu.attach(guest.qmp) as vm:
        with pytest.raises(TransitionError) as caught:
            await vm.set_map("0,3-4", on_failure=OnFailure.REVERT)
        assert vm.layout.enabled == {0, 1, 2}
    change = spans.one("set_map")
    check_times(spans)
    assert told(change, "outcome", "on_failure") == ["reverted", "revert"]
    assert failed(change)
    assert change.status.description == str(caught.value)
    below = spans.below(change)
    assert [(span.name.removeprefix("qmpvcpu."), *told(span, "vcpus", "verdict")) for span in below] == [
        ("step.plug", "3", "plugged"),
        ("step.plug", "4", "plugged"),
        ("step.unplug", "2", "unplugged"),
        ("step.unplug", "1", "refused"),
        ("undo.unplug", "2", "plugged"),
        ("undo.plug", "4", "unplugged"),
        ("undo.plug", "3", "unplugged"),
    ]
    assert [failed(span) for span in below] == [False] * 3 + [True] + [False] * 3
    refused, undoing = below[3], below[4:]
    assert refused.end_time is not None
    assert all((span.start_time or 0) >= refused.end_time for span in undoing)


async def test_an_undoing_that_is_refused_is_an_error_of_its_own(spans: Spans) -> None:
    behaviour = [BUSY.for_slot(1), BUSY.for_slot(3)]
    async with MicroGuest(boot=2, behaviour=behaviour) as guest, qmpvcpu.attach(guest.qmp) as vm:
        with pytest.raises(TransitionError):
            await vm.set_map("0,3", on_failure=OnFailure.REVERT)
    assert told(spans.one("set_map"), "outcome") == ["revert incomplete"]
    undo = spans.one("undo.plug")
    assert told(undo, "action", "verdict", "ost.code") == ["unplug", "refused", 0x82]
    assert failed(undo)


async def test_what_a_map_did_not_send_is_named_and_has_no_span(spans: Spans) -> None:
    async with MicroGuest(boot=4, behaviour=BUSY.for_slot(3)) as guest, qmpvcpu.attach(guest.qmp) as vm:
        with pytest.raises(TransitionError):
            await vm.set_map("0")
    change = spans.one("set_map")
    assert told(change, "unsent", "outcome") == ["1-2", "partial"]
    assert len(spans.below(change)) == 1


async def test_removals_that_are_only_requested_are_no_error_of_a_map(spans: Spans) -> None:
    async with MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.set_map("0", timeout=0)
    assert told(spans.one("set_map"), "outcome") == ["requested"]
    step = spans.one("step.unplug")
    assert told(step, "verdict") == ["pending"]
    assert not failed(step)


async def test_every_change_is_named_after_its_call(spans: Spans) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.set_state(3, enabled=True)
        await vm.set_count(3)
        await vm.request_unplug(1)
        assert [*map(stages_of_one(spans), ("set_state", "set_count", "request_unplug"))] == [["planned"]] * 3
    machine = ["-machine", "q35", "-accel", "tcg", "-m", "16", "-smp", "1,maxcpus=8", "-S"]
    async with QemuProcess(best_qemu(), machine) as qemu, qmpvcpu.attach(qemu.qmp) as vm:
        await vm.replay(vm.layout)
    assert told(spans.one("replay"), "outcome") == ["reached"]


# Who waits no longer.


async def test_an_answer_that_nobody_waited_for_is_a_span_below_the_step_that_asked(spans: Spans) -> None:
    async with MicroGuest(behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        with pytest.raises(UnplugPendingError):
            await vm.unplug(3, timeout=0.05)
        events = vm.events()
        await guest.set_behaviour(Behaviour.complying())
        await until(events, VcpuUnplugged)
    _, step = change_and_step(spans, "unplug", "unplug")
    assert stages(step)[-2:] == ["pending", "exception"]
    assert told(step, "verdict") == ["pending"]
    late = spans.one("late_answer")
    assert spans.below(step) == [late]
    assert late.context.trace_id == step.context.trace_id
    assert told(late, "vcpus", "verdict") == ["3", "unplugged"]
    assert late.start_time == step.end_time
    assert not failed(late)


async def test_a_late_refusal_has_its_code(spans: Spans) -> None:
    async with MicroGuest(behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        request = await vm.request_unplug(3)
        events = vm.events()
        await guest.set_behaviour(BUSY)
        await until(events, UnplugRefused)
        assert request.verdict is not None
    _, step = change_and_step(spans, "request_unplug", "unplug")
    assert stages(step)[:1] == ["sent"]
    late = spans.one("late_answer")
    assert told(late, "verdict", "ost.code") == ["refused", 0x82]
    assert spans.below(step) == [late]


async def test_who_joins_a_removal_is_linked_to_the_step_that_asked(spans: Spans) -> None:
    async with MicroGuest(behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        request = await vm.request_unplug(3)
        assert isinstance(await request.wait(0.05), Pending)
        joining = asyncio.create_task(vm.unplug(3))
        await asyncio.sleep(0)
        await guest.set_behaviour(Behaviour.complying())
        await joining
    asked, joined = spans.of("step.unplug")
    assert told(asked, "joined") == [False]
    assert told(joined, "joined", "verdict") == [True, "unplugged"]
    assert stages(joined)[0] == "joined"
    assert stages(joined)[-1] == "gone"
    assert [link.context.span_id for link in joined.links] == [id_of(asked)]
    check_times(spans)


async def test_two_who_wait_for_one_removal_are_linked_too(spans: Spans) -> None:
    async with MicroGuest(behaviour=Behaviour.slow(50)) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        with spans.caller("one"):
            one = asyncio.create_task(vm.unplug(3))
        with spans.caller("two"):
            two = asyncio.create_task(vm.unplug(3))
        await asyncio.gather(one, two)
    asked, joined = spans.of("step.unplug")
    assert [link.context.span_id for link in joined.links] == [id_of(asked)]
    assert asked.context.trace_id != joined.context.trace_id


async def test_the_span_of_a_cancelled_call_ends_when_what_was_sent_is_over(spans: Spans) -> None:
    async with MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await vm.set_map("0")
        await vm.cancel()  # waits for it
    change = spans.one("set_map")
    assert told(change, "cancelled", "outcome") == [True, "partial"]
    assert told(spans.one("step.unplug"), "verdict") == ["pending"]
    check_times(spans)


async def test_the_span_of_a_call_that_was_cancelled_before_its_turn_ends_too(spans: Spans) -> None:
    async with MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        first = asyncio.create_task(vm.set_map("0"))
        await until(vm.events(), UnplugAcknowledged)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await vm.plug(3)
        assert told(spans.one("plug"), "cancelled") == [True]
        await guest.set_behaviour(Behaviour.complying())
        await first
    assert spans.below(spans.one("plug")) == []


@pytest.mark.parametrize("how", ["QEMU dies", "the VM is closed"])
async def test_the_spans_of_what_was_under_way_end_with_the_connection(spans: Spans, how: str) -> None:
    async with MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        events = vm.events()
        one, two = asyncio.create_task(vm.unplug(1)), asyncio.create_task(vm.unplug(2))
        await until(events, UnplugAcknowledged)
        if how == "QEMU dies":
            guest.process.kill()
        else:
            await vm.close()
        for task in (one, two):
            with pytest.raises((MonitorLostError, OutcomeUnknownError)):
                await task
    for span in (*spans.of("unplug"), *spans.of("step.unplug")):
        assert failed(span)
        assert told(span, "vm.outcome") == ["unknown"]
    assert len(spans.all) == 4
    assert all("disconnected" in stages(span) for span in spans.of("unplug"))
    check_times(spans)


async def test_a_connection_that_comes_back_is_noted_in_what_waits_for_it(spans: Spans, tmp_path: Path) -> None:
    async with (
        MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest,
        Proxy(tmp_path / "proxy", guest.sockets[1]) as proxy,
        qmpvcpu.attach(proxy.path, reconnect=True) as vm,
    ):
        events = vm.events()
        task = asyncio.create_task(vm.unplug(1))
        await until(events, UnplugAcknowledged)
        proxy.cut()
        await until(events, Reconnected)
        await guest.set_behaviour(Behaviour.complying())
        await task
    change, step = change_and_step(spans, "unplug", "unplug")
    assert [stage for stage in stages(change) if stage != "planned"] == ["disconnected", "reconnected"]
    assert told(step, "verdict") == ["unplugged"]


# Both sides, and what was cut short.


async def test_a_change_of_both_sides_is_below_its_caller_and_tells_of_the_next_boot(
    spans: Spans, tmp_path: Path
) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="vm", record=tmp_path / "vm.xml") as vm:
        with spans.caller() as caller:
            await vm.set_map("0,2", affect=Affect.BOTH)
    (change,) = spans.below(caller)
    assert told(change, "affect", "outcome", "config.outcome") == ["both", "reached", "unchanged"]
    assert [span.name for span in spans.below(change)] == ["qmpvcpu.step.plug"]


async def test_a_recovery_is_a_change_of_its_own(spans: Spans, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with (
        MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest,
        Proxy(tmp_path / "proxy", guest.sockets[1]) as proxy,
    ):
        async with qmpvcpu.attach(proxy.path, name="vm", record=record) as vm:
            events = vm.events()
            cut_short = asyncio.create_task(vm.set_map("0,3"))
            await until(events, UnplugAcknowledged)
            proxy.cut()
            with pytest.raises(TransitionError):
                await cut_short
        assert told(spans.one("set_map"), "outcome") == ["partial"]
        await guest.set_behaviour(Behaviour.complying())
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
            await vm.recover(Recovery.REVERT)
    recover = spans.one("recover")
    assert told(recover, "outcome") == ["reverted"]
    assert "step.unplug" in {span.name.removeprefix("qmpvcpu.") for span in spans.below(recover)}


# Whose a span is.


async def test_of_a_hundred_plugs_at_once_on_two_vms_each_is_below_its_own_caller(spans: Spans) -> None:
    async def plug(vm: VcpuController, vcpu: int) -> None:
        with spans.caller(f"{vm.layout.vm.name} {vcpu}"):
            await vm.plug(vcpu, proof=Proof.ACKNOWLEDGED if vcpu % 2 else Proof.PRESENT)

    async with (
        MicroGuest(max_vcpus=51) as one,
        MicroGuest(max_vcpus=51) as two,
        qmpvcpu.attach(one.qmp, name="one") as first,
        qmpvcpu.attach(two.qmp, name="two") as second,
    ):
        await asyncio.gather(*(plug(vm, vcpu) for vcpu in range(1, 51) for vm in (first, second)))
    callers = [span for span in spans.all if not span.name.startswith("qmpvcpu.")]
    assert len(callers) == 100
    for caller in callers:
        (change,) = spans.below(caller)
        (step,) = spans.below(change)
        for span in (change, step):
            assert [" ".join(map(str, told(span, "vm.name", "vcpus")))] == [caller.name]
        assert {change.context.trace_id, step.context.trace_id} == {caller.context.trace_id}
    assert len(spans.all) == 300
    check_times(spans)


async def test_a_span_that_was_current_at_attach_is_nobodys_parent(spans: Spans) -> None:
    async with MicroGuest() as guest:
        with spans.caller("attaching"):
            vm = await qmpvcpu.attach(guest.qmp)
        await vm.plug(3)
        await vm.close()
    assert spans.one("plug").parent is None


async def test_what_its_caller_does_not_sample_makes_no_span(spans: Spans) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        with spans.unsampled():
            await vm.plug(3)
            await vm.unplug(3)
    assert spans.all == []


@pytest.mark.parametrize("what", ["on_start", "on_end"])
async def test_a_processor_that_raises_does_a_change_no_harm(
    spans: Spans, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of the program's")

    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="web") as vm:
        monkeypatch.setattr(spans.processor, what, fail)
        assert await vm.plug(3) == {3}
        assert await vm.unplug(3) == {3}
    (record, *_) = [record for record in caplog.records if record.name == "qmpvcpu.traces"]
    assert getattr(record, "vm", None) == "web"
    assert "a fault of the program's" in caplog.text


async def test_what_a_hostile_peer_says_can_be_exported(spans: Spans) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="\ud800\x1b[31m") as vm:
        with pytest.raises(StepDeniedError):
            await vm.plug(0)
    for span in spans.all:
        span.to_json().encode()
        assert told(span, "vm.name") == ["\\ud800\\x1b[31m"]
