"""VMs that migrate away while their host's agent carries out what is wished of them."""

from pathlib import Path

import pytest

from qmpvcpu import TransitionError, VcpuMap
from qmpvcpu.errors import DenialReason, StepDeniedError
from qmpvcpu.fleet import Fleet
from qmpvcpu.hosts import AgentPolicy
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.verdicts import Pending
from qmpvcpu.model.wish import Wish, WishOptions
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.hosts.world import agent_of, answer, connected, served, state, wish
from tests.migration.moving import move
from tests.waiting import until

pytestmark = pytest.mark.qemu

WEB = VmKey("rack1", "web")
NAMED = ("-name", "web")


@pytest.mark.parametrize("source_stays", [True, False])
async def test_a_vm_that_migrates_away_during_a_wish_is_served_where_its_socket_leads_next(
    tmp_path: Path, *, source_stays: bool
) -> None:
    link = tmp_path / "web.qmp"
    async with (
        served() as server,
        connected(server) as bus,
        MicroGuest(extra_args=NAMED, boot=3, behaviour=Behaviour.hanging()) as source,
        MicroGuest(extra_args=NAMED, boot=3, accel=source.accelerator, incoming=True) as target,
    ):
        link.symlink_to(source.qmp)
        async with agent_of(server, "rack1", tmp_path) as agent:
            await state(bus, WEB, lambda now: "enabled" in now)
            before = agent.vms["web"].vm
            async with Fleet(server.url) as fleet:
                results = fleet.set_map("0", timeout=5 if source_stays else 60)
                await state(bus, WEB, lambda now: now["pending"] == "2")
                assert await move(source, target) == "completed"
                if not source_stays:
                    link.unlink()
                    link.symlink_to(target.qmp)
                    source.process.kill()
                (only,) = await results
                assert isinstance(only.error, TransitionError)
                assert isinstance(only.error.report.steps[0].verdict, Pending)
                if source_stays:
                    (only,) = await fleet.set_map("0-3")
                    assert isinstance(only.error, StepDeniedError)
                    assert only.error.reason is DenialReason.MIGRATED_AWAY
                    link.unlink()
                    link.symlink_to(target.qmp)
                    source.process.kill()
            # The removal migrates too, and nobody answers it there.
            await until(lambda: agent.vms["web"].vm not in (None, before))
            plugged = Wish("2", VcpuMap.parse("0-3"), options=WishOptions(timeout=0.5))
            now = await answer(bus, WEB, await wish(bus, WEB, plugged), "ended")
            assert (now["enabled"], now["pending"], now["code"]) == ("0-3", "2", 1)


async def test_what_came_of_a_wish_is_told_though_its_vm_is_gone_since(tmp_path: Path) -> None:
    async with served() as server, connected(server) as bus:
        async with agent_of(server, "rack1", tmp_path):
            async with MicroGuest(extra_args=NAMED, boot=3, behaviour=Behaviour.refusing(0x82)) as guest:
                (tmp_path / "web.qmp").symlink_to(guest.qmp)
                revision = await wish(bus, WEB, Wish("1", VcpuMap.parse("0")))
                await answer(bus, WEB, revision, "ended")
            gone = await state(bus, WEB, lambda now: "enabled" not in now)
            assert gone["error"]["kind"] in {"MonitorLostError", "MonitorConnectError"}
            assert gone["came_to"]["error"]["kind"] == "TransitionError"
        # The next agent knows it from there.
        async with (
            agent_of(server, "rack1", tmp_path, policy=AgentPolicy.read_only()),
            MicroGuest(extra_args=NAMED) as again,
        ):
            (tmp_path / "web.qmp").unlink()
            (tmp_path / "web.qmp").symlink_to(again.qmp)
            back = await state(bus, WEB, lambda now: "enabled" in now)
    assert (back["answer"]["revision"], back["error"]["kind"]) == (revision, "TransitionError")
