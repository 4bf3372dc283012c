"""What cannot be meant is refused before anything is sent: durations, numbers, flags and choices of every call."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import pytest

import qmpvcpu
from qmpvcpu import InvalidMapError, Layout, Pending, Recovery, VcpuController
from qmpvcpu.migration import DifferenceKind, check_target, confirm_target
from qmpvcpu.qmp.queries import look
from qmpvcpu.testing import Behaviour, MicroGuest, ScriptedPeer
from tests.exchange import exchange

pytestmark = pytest.mark.qemu
Call = Callable[[VcpuController, Any], Awaitable[object]]


DURATIONS: dict[str, tuple[str, Call]] = {
    "plug": ("timeout", lambda vm, given: vm.plug(3, timeout=given)),
    "unplug": ("timeout", lambda vm, given: vm.unplug(2, timeout=given)),
    "set_state": ("timeout", lambda vm, given: vm.set_state(2, enabled=False, timeout=given)),
    "set_map": ("timeout", lambda vm, given: vm.set_map("0", timeout=given)),
    "set_map, total": ("total_timeout", lambda vm, given: vm.set_map("0", total_timeout=given)),
    "set_map, revert": ("revert_timeout", lambda vm, given: vm.set_map("0", revert_timeout=given)),
    "set_count": ("timeout", lambda vm, given: vm.set_count(1, timeout=given)),
    "set_count, total": ("total_timeout", lambda vm, given: vm.set_count(1, total_timeout=given)),
    "set_count, revert": ("revert_timeout", lambda vm, given: vm.set_count(1, revert_timeout=given)),
    "wait_for": ("timeout", lambda vm, given: vm.wait_for(lambda _: False, timeout=given)),
    "wait_settled": ("timeout", lambda vm, given: vm.wait_settled(timeout=given)),
    "recover": ("timeout", lambda vm, given: vm.recover(Recovery.FINISH, timeout=given)),
    "export": ("settle", lambda vm, given: vm.export(settle=given)),
}
NO_DURATION = r"^(reply_)?timeout is a (finite )?number of seconds"
NO_DURATIONS = ["30", Decimal(30), True, [1], math.nan, math.inf, -1, -0.001, 10**400]
NOT_MEANT: dict[str, tuple[str, Call]] = {
    "plug('3')": ("vcpu is a whole number", lambda vm, _: vm.plug("3")),  # type: ignore[arg-type]
    "plug(3.0)": ("vcpu is a whole number", lambda vm, _: vm.plug(3.0)),  # type: ignore[arg-type]
    "plug(True)": ("vcpu is a whole number", lambda vm, _: vm.plug(vcpu=True)),
    "unplug('2')": ("vcpu is a whole number", lambda vm, _: vm.unplug("2")),  # type: ignore[arg-type]
    "unplug(None)": ("vcpu is a whole number", lambda vm, _: vm.unplug(None)),  # type: ignore[arg-type]
    "request_unplug([2])": ("vcpu is a whole number", lambda vm, _: vm.request_unplug([2])),  # type: ignore[arg-type]
    "set_state('2')": (
        "vcpu is a whole number",
        lambda vm, _: vm.set_state("2", enabled=False),  # type: ignore[arg-type]
    ),
    "enabled='no'": (
        "enabled is True or False",
        lambda vm, _: vm.set_state(3, enabled="no"),  # type: ignore[arg-type]
    ),
    "allow_fatal='no'": (
        "allow_fatal is True or False",
        lambda vm, _: vm.plug(3, allow_fatal="no"),  # type: ignore[arg-type]
    ),
    "include_boot=1": (
        "include_boot is True or False",
        lambda vm, _: vm.set_count(1, include_boot=1),  # type: ignore[arg-type]
    ),
    "proof": ("proof is one of Proof.PRESENT", lambda vm, _: vm.plug(3, proof="present")),  # type: ignore[arg-type]
    "affect": ("affect is one of Affect.LIVE", lambda vm, _: vm.unplug(2, affect="live")),  # type: ignore[arg-type]
    "on_failure": (
        "on_failure is one of OnFailure.STOP",
        lambda vm, _: vm.set_map("0", on_failure="revert"),  # type: ignore[arg-type]
    ),
    "in_flight='8'": (
        "in_flight is a whole number",
        lambda vm, _: vm.set_map("0", in_flight="8"),  # type: ignore[arg-type]
    ),
    "in_flight=True": ("in_flight is a whole number", lambda vm, _: vm.set_map("0", in_flight=True)),
    "in_flight=0": ("in_flight is at least 1, not 0", lambda vm, _: vm.set_count(1, in_flight=0)),
    "replay in_flight=0": ("in_flight is at least 1, not 0", lambda vm, _: vm.replay(vm.layout, in_flight=0)),
    "set_map(3)": ("vCPU ids are given as a collection, .* not 3", lambda vm, _: vm.set_map(3)),  # type: ignore[arg-type]
    "set_map(None)": ("vCPU ids are given as a collection, .* not None", lambda vm, _: vm.set_map(None)),  # type: ignore[arg-type]
    "set_map(['2'])": ("a vCPU id is an int", lambda vm, _: vm.set_map(["0", "2"])),  # type: ignore[list-item]
    "set_map([2.0])": ("a vCPU id is an int", lambda vm, _: vm.set_map([0, 2.0])),  # type: ignore[list-item]
    "set_map(bytes)": ("is not a set of vCPU ids", lambda vm, _: vm.set_map(b"0-2")),
    "set_count('1')": ("count is a whole number", lambda vm, _: vm.set_count("1")),  # type: ignore[arg-type]
    "set_count(True)": ("count is a whole number", lambda vm, _: vm.set_count(True)),
    "wait_for('x')": (
        'predicate is a function, not "x"',
        lambda vm, _: vm.wait_for("x"),  # type: ignore[arg-type]
    ),
    "wait_for(async)": ("predicate is a plain function", lambda vm, _: vm.wait_for(asks_later)),
    "check_target(accept='uuid')": (
        'accept is a collection of DifferenceKind, not "uuid"',
        lambda vm, _: check_target(cast("Any", None), vm, accept="uuid"),  # type: ignore[arg-type]
    ),
    "check_target(accept=kind)": (
        "accept is a collection of DifferenceKind",
        lambda vm, _: check_target(cast("Any", None), vm, accept=DifferenceKind.UUID),  # type: ignore[arg-type]
    ),
    "check_target(accept=['uuid'])": (
        "each of accept is one of DifferenceKind.RUN_STATE",
        lambda vm, _: check_target(cast("Any", None), vm, accept=["uuid"]),  # type: ignore[list-item]
    ),
    "statistics('exits')": ("kvm is a collection of text", lambda vm, _: vm.statistics(kvm="exits")),
    "statistics([1])": ("each of kvm is text", lambda vm, _: vm.statistics(kvm=[1])),  # type: ignore[list-item]
    "recover('redo')": ("how is one of Recovery", lambda vm, _: vm.recover("redo")),  # type: ignore[arg-type]
}


async def asks_later(_: Layout) -> bool:
    return False


async def refused(vm: VcpuController, call: Call, given: object, said: str) -> None:
    """See that *call* refuses *given* in the words *said*, sends nothing, and leaves nothing behind."""
    with exchange() as sent, pytest.raises((TypeError, ValueError), match=said) as caught:
        await call(vm, given)
    assert type(caught.value) in {TypeError, ValueError, InvalidMapError}
    assert sent == []


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    async with MicroGuest() as micro:
        yield micro


@pytest.mark.parametrize("name", DURATIONS)
async def test_a_duration_that_cannot_be_meant_sends_nothing(name: str, guest: MicroGuest) -> None:
    parameter, call = DURATIONS[name]
    async with qmpvcpu.attach(guest.qmp, resync_interval=None) as vm:
        await vm.plug(2)
        for given in NO_DURATIONS:
            await refused(vm, call, given, f"^{parameter} is a ")
        assert vm.layout.enabled == {0, 2}
        assert not vm.layout.pending


async def test_what_cannot_be_meant_sends_nothing(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp, resync_interval=None) as vm:
        await vm.plug(2)
        for said, call in NOT_MEANT.values():
            await refused(vm, call, None, said)
        assert vm.layout.enabled == {0, 2}
        assert not vm.layout.pending


async def test_a_wait_that_cannot_be_meant_leaves_the_request_as_it_is(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with qmpvcpu.attach(guest.qmp, resync_interval=None) as vm:
        await vm.plug(2)
        request = await vm.request_unplug(2)
        for given in NO_DURATIONS:
            with pytest.raises((TypeError, ValueError), match=NO_DURATION):
                await request.wait(given)  # type: ignore[arg-type]
        assert isinstance(await request.wait(0), Pending)
        await guest.set_behaviour(Behaviour.complying())
        assert (await request.wait(10)).ids == {2}


@pytest.mark.parametrize("given", NO_DURATIONS)
async def test_a_target_is_not_asked_for_a_wait_that_cannot_be_meant(guest: MicroGuest, given: Any) -> None:
    async with qmpvcpu.attach(guest.qmp, resync_interval=None) as vm, await vm.export() as exported:
        with exchange() as sent, pytest.raises((TypeError, ValueError), match=NO_DURATION):
            await confirm_target(exported, vm, timeout=given)
        assert sent == []


@pytest.mark.parametrize("given", [Fraction(60), 10**18, 1e300])
async def test_any_real_number_is_a_duration_however_long(guest: MicroGuest, given: float) -> None:
    async with qmpvcpu.attach(guest.qmp, reply_timeout=given, resync_interval=given) as vm:
        assert await vm.plug(2, proof=qmpvcpu.Proof.ACKNOWLEDGED, timeout=given) == {2}
        assert await vm.unplug(2, timeout=given) == {2}
        await vm.set_map("0,3", timeout=given, total_timeout=given)
        assert (await vm.wait_settled(timeout=given)).enabled == {0, 3}


async def test_what_stands_for_an_int_is_a_vcpu_id(guest: MicroGuest) -> None:
    class Two:
        def __index__(self) -> int:
            return 2

    two: Any = Two()
    async with qmpvcpu.attach(guest.qmp) as vm:
        assert await vm.plug(two) == {2}
        assert await vm.unplug(two) == {2}
        assert (await vm.set_map([0, two])).layout.enabled == {0, 2}
        assert (await vm.set_count(two)).layout.enabled == {0, 2}


# attach, which connects to nobody then.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(({"reply_timeout": given}, "reply_timeout is a ") for given in NO_DURATIONS),
        *(({"resync_interval": given}, "resync_interval is a ") for given in NO_DURATIONS),
        ({"reconnect": "no"}, "reconnect is True or False"),
        ({"on_interrupted": "redo"}, "on_interrupted is one of Recovery"),
        ({"name": 3}, "name is text"),
        ({"record": 3}, "record is a path"),
        ({"record": b"vm.xml"}, "record is a path"),
        ({"record": "vm\0.xml"}, "record is a path"),
        ({"record": ""}, "record is a path"),
        ({"config": 3}, "config is a path"),
        ({"record": "vm.xml", "base": 3}, "base is a path"),
    ],
)
async def test_an_attach_that_cannot_be_meant_connects_to_nobody(options: dict[str, Any], said: str) -> None:
    async with ScriptedPeer() as peer:
        with pytest.raises((TypeError, ValueError), match=said):
            async with qmpvcpu.attach(peer.path, **options):
                pass
        assert list(peer.transcript) == []


@pytest.mark.parametrize("given", NO_DURATIONS)
async def test_a_look_that_cannot_be_meant_connects_to_nobody(given: Any) -> None:
    async with ScriptedPeer() as peer:
        with pytest.raises((TypeError, ValueError), match=NO_DURATION):
            await look(peer.path, reply_timeout=given)
        assert list(peer.transcript) == []


async def test_the_timers_of_the_loop_are_as_they_were_after_a_duration_that_is_none(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        for given in (math.nan, math.inf):
            with pytest.raises(ValueError, match="finite"):
                await vm.wait_for(lambda _: False, timeout=given)
        loop = asyncio.get_running_loop()
        rung: list[int] = []
        for number, delay in enumerate((0.003, 0.001, 0.002)):
            loop.call_later(delay, rung.append, number)
        await asyncio.sleep(0.01)
        assert rung == [1, 2, 0]
