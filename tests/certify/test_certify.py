"""Each kind of guest is certified as what it is, and nothing stays behind."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import VcpuController
from qmpvcpu.certify import Ability, AbilityRow, AbilityVerdict, Certificate, certify
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.testing import Behaviour, MicroGuest, find_qemus
from qmpvcpu.testing.agent import Mood, ScriptedAgent
from qmpvcpu.testing.qemu import Accelerator
from tests.exchange import exchange
from tests.waiting import until

pytestmark = pytest.mark.qemu

WORKS, REFUSED, NEVER, NOT_POSSIBLE, LOST = AbilityVerdict
# The micro-guest is up in 10 ms.
BOOT = 0.3
# How long the micro-guest gets for each answer; it needs milliseconds.
SOON = 2.0


async def rows_of(found: AsyncGenerator[AbilityRow, None]) -> dict[Ability, AbilityRow]:
    async with contextlib.aclosing(found) as rows:
        return {row.ability: row async for row in rows}


COMPLYING = Behaviour.complying()


async def certified(
    behaviour: Behaviour = COMPLYING, *, timeout: float = 0.3, vm: Mapping[str, Any] | None = None
) -> dict[Ability, AbilityRow]:
    """What a micro-guest of that kind is certified as; it has the vCPUs that it had, as far as it gives any back."""
    how = {"accel": "tcg", **(vm or {})}
    starting = behaviour if behaviour.insert_status else behaviour.starting()
    async with MicroGuest(behaviour=starting, **how) as guest, qmpvcpu.attach(guest.qmp) as attached:
        rows = await rows_of(certify(attached, fresh=True, timeout=timeout, boot=BOOT))
        if rows[Ability.PUT_BACK].verdict is WORKS:
            assert (await attached.refresh()).enabled == {0}
    assert [*rows] == [*Ability]
    return rows


def but(rows: dict[Ability, AbilityRow]) -> dict[Ability, AbilityVerdict]:
    """The verdicts of what does not work; these guests have no agent."""
    told = {ability: row.verdict for ability, row in rows.items() if row.verdict is not WORKS}
    untold = {Ability.ONLINE: NOT_POSSIBLE, Ability.OFFLINE_FIRST: NOT_POSSIBLE}
    assert told.items() >= untold.items()
    return {ability: verdict for ability, verdict in told.items() if ability not in untold}


async def test_an_obliging_guest_can_do_everything() -> None:
    rows = await certified(timeout=SOON)
    assert but(rows) == {Ability.REFUSAL: NOT_POSSIBLE}
    assert "nothing here makes this guest refuse" in str(rows[Ability.REFUSAL])
    assert rows[Ability.PENDING_OVER_RESET].detail in ("on its own", "with the next plug")
    unmeasured = [ability for ability, row in rows.items() if row.seconds is None]
    assert unmeasured == [Ability.ONLINE, Ability.OFFLINE_FIRST, Ability.REFUSAL, Ability.PENDING_OVER_RESET]
    assert rows[Ability.ONLINE].detail == "no agent was given that could be asked"


class Refusing:
    """Makes a micro-guest refuse that starts its vCPUs."""

    def __init__(self, guest: MicroGuest) -> None:
        self._guest = guest

    async def refuse(self) -> None:
        await self._guest.set_behaviour(Behaviour.refusing(0x82).starting())

    async def comply(self) -> None:
        await self._guest.set_behaviour(COMPLYING.starting())


@pytest.mark.kvm
async def test_a_guest_that_starts_its_vcpus_is_told_as_that_under_kvm() -> None:
    # No further: some hosts' KVM takes no vCPU again that has run, and QEMU ends.
    async with (
        MicroGuest(accel="kvm", behaviour=COMPLYING.starting()) as guest,
        qmpvcpu.attach(guest.qmp) as vm,
        contextlib.aclosing(certify(vm, fresh=True, timeout=SOON)) as rows,
    ):
        (started,) = [row async for row in until_ability(rows, Ability.STARTED)][-1:]
    assert (started.verdict, started.detail) == (WORKS, "on its own")


async def until_ability(rows: AsyncGenerator[AbilityRow, None], last: Ability) -> AsyncIterator[AbilityRow]:
    async for row in rows:
        yield row
        if row.ability is last:
            return


async def test_what_can_make_the_guest_refuse_proves_that_a_refusal_is_heard() -> None:
    async with MicroGuest(accel="tcg", behaviour=COMPLYING.starting()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        rows = await rows_of(certify(vm, fresh=True, timeout=SOON, boot=BOOT, provocation=Refusing(guest)))
    assert but(rows) == {}
    assert rows[Ability.REFUSAL].detail == "device is busy, OST status 0x82"


async def test_a_refusing_guest_is_told_as_one() -> None:
    rows = await certified(Behaviour.refusing(0x81), timeout=SOON)
    assert but(rows) == {
        Ability.UNPLUG: REFUSED,
        Ability.PLUG_AGAIN: NOT_POSSIBLE,
        Ability.PENDING_OVER_RESET: REFUSED,
        Ability.PUT_BACK: REFUSED,
    }
    assert rows[Ability.UNPLUG].detail == "device is in use by an application, OST status 0x81"
    assert rows[Ability.PLUG_AGAIN].detail == "it needs: unplug"
    assert not rows[Ability.UNPLUG].ok


async def test_a_silent_guest_never_gives_anything_up() -> None:
    rows = await certified(Behaviour.silent())
    assert but(rows) == {
        Ability.UNPLUG: NEVER,
        Ability.PLUG_AGAIN: NOT_POSSIBLE,
        Ability.REFUSAL: NOT_POSSIBLE,
        Ability.PENDING_OVER_RESET: NEVER,
        Ability.PUT_BACK: NEVER,
    }
    assert rows[Ability.UNPLUG].detail == "the guest has not reacted"
    assert rows[Ability.UNPLUG].said.startswith("never (waited 0.")


async def test_a_lying_guest_is_seen_through() -> None:
    rows = await certified(Behaviour.lying(), timeout=SOON)
    assert rows[Ability.UNPLUG].verdict is REFUSED
    assert "success" in rows[Ability.UNPLUG].detail


async def test_a_guest_that_says_nothing_of_plugs_has_them_all_the_same() -> None:
    rows = await certified(Behaviour.silent_about_inserts())
    assert but(rows) == {Ability.ACKNOWLEDGED: NEVER, Ability.REFUSAL: NOT_POSSIBLE}
    assert rows[Ability.ACKNOWLEDGED].seconds == 0.3
    assert "the guest may not have been up yet: certify it later, with a longer boot=" in str(
        rows[Ability.ACKNOWLEDGED]
    )


async def test_a_guest_that_takes_no_vcpu_says_so() -> None:
    rows = await certified(Behaviour.refusing_inserts(0x81), timeout=SOON)
    assert but(rows) == {Ability.ACKNOWLEDGED: REFUSED, Ability.STARTED: NEVER, Ability.REFUSAL: NOT_POSSIBLE}
    assert "driver load failure" in rows[Ability.ACKNOWLEDGED].detail


async def test_a_guest_that_is_deaf_until_a_reset_answers_after_it() -> None:
    rows = await certified(Behaviour.silent_until_reset())
    assert rows[Ability.UNPLUG].verdict is NEVER
    assert rows[Ability.PENDING_OVER_RESET].verdict is WORKS


@pytest.mark.parametrize("version", find_qemus())
async def test_what_a_qemu_does_not_survive_is_never_tried(version: str) -> None:
    vm = {"qemu": find_qemus()[version], "accel": "tcg"}
    rows = await certified(timeout=SOON, vm=vm)
    failed = but(rows)
    assert failed.pop(Ability.REFUSAL) is NOT_POSSIBLE
    if version.startswith("7."):
        after_an_unplug = Ability.PLUG_AGAIN, Ability.AFTER_REBOOT, Ability.PENDING_OVER_RESET
        assert failed == dict.fromkeys(after_an_unplug, NOT_POSSIBLE)
        assert "corrupts its heap" in rows[Ability.PLUG_AGAIN].detail
    else:
        assert failed == {}


@pytest.mark.parametrize("version", find_qemus())
async def test_a_reset_after_an_unplug_is_survived_by_a_qemu_without_that_fault(version: str) -> None:
    async with MicroGuest(find_qemus()[version], accel="tcg") as guest, qmpvcpu.attach(guest.qmp) as vm:
        if KnownFault.TCG_REPLUG_CORRUPTS_HEAP in vm.capabilities.known_faults:
            return  # it mostly ends at once, by SIGSEGV or SIGABRT; on a busy machine it may go on for a while
        await vm.plug(1, proof=qmpvcpu.Proof.ACKNOWLEDGED)
        await vm.unplug(1)
        await vm.run_control.reset()
        await guest.wait_ready()


async def test_a_single_threaded_tcg_gives_nothing_back() -> None:
    rows = await certified(timeout=SOON, vm={"accel": "tcg,thread=single"})
    assert {ability for ability, row in rows.items() if row.verdict is WORKS} >= {Ability.PLUG, Ability.IN_A_HOLE}
    for ability in (Ability.UNPLUG, Ability.PENDING_OVER_RESET, Ability.PUT_BACK):
        assert rows[ability].verdict is NOT_POSSIBLE
        assert rows[ability].detail.endswith("aborts when the guest ejects a vCPU")  # no word of allow_fatal=


async def test_a_full_machine_is_told_as_that() -> None:
    async with MicroGuest(boot=2, max_vcpus=2, accel="tcg") as guest, qmpvcpu.attach(guest.qmp) as vm:
        rows = await rows_of(certify(vm, fresh=True, timeout=1, boot=BOOT))
    assert rows[Ability.PLUG].detail == "no free slot: start it with -smp N,maxcpus=M"
    nothing = dict.fromkeys(Ability, NOT_POSSIBLE)
    assert {ability: row.verdict for ability, row in rows.items()} == {**nothing, Ability.PUT_BACK: WORKS}


async def test_without_resets_the_vm_is_neither_paused_nor_reset() -> None:
    async with MicroGuest(accel="tcg", behaviour=COMPLYING.starting()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        with exchange() as sent:
            rows = await rows_of(certify(vm, fresh=True, timeout=SOON, resets=False))
    assert {"stop", "cont", "system_reset"}.isdisjoint(sent)
    assert but(rows) == dict.fromkeys(
        (Ability.REFUSAL, Ability.AFTER_REBOOT, Ability.PENDING_OVER_RESET), NOT_POSSIBLE
    )


async def test_a_qemu_that_dies_is_said_in_its_row_and_the_rest_is_not_tried() -> None:
    async with MicroGuest(accel="tcg", behaviour=COMPLYING.starting()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        rows = []
        async with contextlib.aclosing(certify(vm, fresh=True, timeout=SOON, boot=BOOT)) as found:
            async for row in found:
                rows.append(row)
                if row.ability is Ability.ALL_AT_ONCE:
                    guest.process.kill()
                    await guest.process.wait()
    verdicts = [row.verdict for row in rows]
    before = [WORKS, WORKS, WORKS, NOT_POSSIBLE, WORKS, WORKS]
    assert verdicts == [*before, LOST, *[NOT_POSSIBLE] * 6]
    assert rows[-1].detail == "QEMU was lost at: unplug"


async def test_a_reset_that_ends_qemu_is_told() -> None:
    rows = await certified(timeout=SOON, vm={"extra_args": ("-no-reboot",)})
    assert rows[Ability.AFTER_REBOOT].verdict is LOST
    assert rows[Ability.PENDING_OVER_RESET].verdict is NOT_POSSIBLE


@pytest.mark.parametrize("after", [Ability.PLUG, Ability.ALL_AT_ONCE, Ability.PLUG_AGAIN, Ability.AFTER_REBOOT])
async def test_one_that_is_left_half_way_puts_everything_back(after: Ability) -> None:
    async with MicroGuest(boot=(0, 2), accel="tcg") as guest, qmpvcpu.attach(guest.qmp) as vm:
        async with contextlib.aclosing(certify(vm, fresh=True, timeout=SOON, boot=BOOT)) as rows:
            async for row in rows:
                if row.ability is after:
                    break
        assert (await vm.refresh()).enabled == {0, 2}


async def test_one_that_is_disposable_is_left_as_it_is() -> None:
    async with MicroGuest(accel="tcg") as guest, qmpvcpu.attach(guest.qmp) as vm:
        async with contextlib.aclosing(certify(vm, fresh=True, timeout=SOON, disposable=True)) as rows:
            assert (await anext(rows)).verdict is WORKS
        assert (await vm.refresh()).enabled == {0, 1}


async def test_cancelled_while_the_vm_is_paused_or_boots_it_runs_again_as_it_was() -> None:
    async with MicroGuest(accel="tcg") as guest, qmpvcpu.attach(guest.qmp) as vm:
        with exchange() as sent:
            work = asyncio.ensure_future(rows_of(certify(vm, fresh=True, timeout=SOON, boot=1)))
            await until(lambda: "system_reset" in sent)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
        assert (await vm.refresh()).enabled == {0}
        await vm.plug(3)
        await vm.unplug(3, timeout=10)


@pytest.mark.parametrize("accel", ["tcg", pytest.param("kvm", marks=pytest.mark.kvm)])
async def test_a_guest_that_starts_no_vcpu_is_told_as_that(accel: Accelerator) -> None:
    async with MicroGuest(accel=accel) as guest, qmpvcpu.attach(guest.qmp) as vm:
        rows = await rows_of(certify(vm, fresh=True, timeout=0.5, resets=False))
    assert rows[Ability.ACKNOWLEDGED].verdict is WORKS
    assert (rows[Ability.STARTED].verdict, rows[Ability.STARTED].seconds) == (NEVER, 0.5)
    assert ("6.12.77" in rows[Ability.STARTED].detail) == (accel == "tcg")
    assert "may not have been up" not in rows[Ability.STARTED].detail  # it has acknowledged it


async def test_slots_that_tcg_leaves_free_for_nobody_are_told_as_that() -> None:
    rows = await certified(timeout=SOON, vm={"max_vcpus": 6})
    assert rows[Ability.ALL_AT_ONCE].verdict is NOT_POSSIBLE
    assert "more vCPUs were ever created than maxcpus, and the other rows need what is left" in str(
        rows[Ability.ALL_AT_ONCE]
    )
    assert rows[Ability.AFTER_REBOOT].verdict is WORKS


@contextlib.asynccontextmanager
async def with_agent(*, onlines: bool) -> AsyncIterator[tuple[ScriptedAgent, VcpuController]]:
    """A VM whose guest uses a CPU that comes by itself, or not, and has an agent that tells."""
    async with MicroGuest(accel="tcg") as guest, contextlib.AsyncExitStack() as ends:
        agent = ScriptedAgent(onlines=onlines, look=lambda: vm.layout.enabled)
        await ends.enter_async_context(agent)
        vm = await ends.enter_async_context(qmpvcpu.attach(guest.qmp, agent=agent.path))
        yield agent, vm


@pytest.mark.parametrize(("onlines", "by"), [(True, "on its own"), (False, "by the agent")])
async def test_who_had_the_guest_use_a_vcpu_is_told(onlines: bool, by: str) -> None:
    async with with_agent(onlines=onlines) as (agent, vm):
        rows = await rows_of(certify(vm, fresh=True, timeout=1, boot=10))
    assert (rows[Ability.ONLINE].verdict, rows[Ability.ONLINE].detail) == (WORKS, by)
    assert any(online for _, online in agent.changes) == (not onlines)
    assert rows[Ability.OFFLINE_FIRST].verdict is WORKS
    assert [online for _, online in agent.changes if not online] == [False]
    assert rows[Ability.AFTER_REBOOT].verdict is WORKS
    assert rows[Ability.REFUSAL].verdict is NOT_POSSIBLE
    assert "guest-exec is not supported" in rows[Ability.REFUSAL].detail


async def test_a_guest_that_will_not_use_a_vcpu_has_refused() -> None:
    async with with_agent(onlines=False) as (agent, vm):
        await agent.turn(Mood.REFUSING)
        rows = await rows_of(certify(vm, fresh=True, timeout=1, resets=False))
    assert rows[Ability.ONLINE].verdict is REFUSED
    assert rows[Ability.ONLINE].detail.endswith("busy, by the agent")


async def test_a_guest_that_never_lists_a_vcpu_has_none_online() -> None:
    async with with_agent(onlines=True) as (agent, vm):
        agent.answers["guest-get-vcpus"] = [{"logical-id": 0, "online": True, "can-offline": False}]
        rows = await rows_of(certify(vm, fresh=True, timeout=0.5, resets=False))
    assert (rows[Ability.ONLINE].verdict, rows[Ability.ONLINE].detail) == (NEVER, "the guest does not list it")
    assert rows[Ability.OFFLINE_FIRST].detail == "it needs: online in the guest"


async def test_an_agent_that_answers_nothing_tells_nothing_of_the_guest() -> None:
    async with with_agent(onlines=True) as (agent, vm):
        await agent.turn(Mood.SILENT)
        rows = await rows_of(certify(vm, fresh=True, timeout=1, boot=0.3))
    assert rows[Ability.ONLINE].verdict is NOT_POSSIBLE
    assert "no answer within" in rows[Ability.ONLINE].detail
    assert rows[Ability.PUT_BACK].verdict is WORKS


async def one_row(vm: VcpuController) -> AbilityRow:
    async with contextlib.aclosing(certify(vm, fresh=True, timeout=SOON)) as rows:
        return await anext(rows)


async def test_a_certificate_is_read_back_as_it_was_written() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="web1") as vm:
        certificate = Certificate.of(vm.capabilities, [await one_row(vm)])
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert certificate.ok
    assert (certificate.name, certificate.rows[0].verdict) == ("web1", WORKS)
    with pytest.raises(ValueError, match="'verdict': \"odd\" is not one of works, refused"):
        Certificate.from_json(
            {**certificate.to_json(), "rows": [{**certificate.to_json()["rows"][0], "verdict": "odd"}]}
        )
