"""What an agent answers is what the command line prints on its host, and is read back elsewhere."""

from pathlib import Path
from typing import Any

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.documents import code_of, error_from_json, layout_from_json, plan_from_json, statistics_from_json
from qmpvcpu.errors import UnplugRefusedError
from qmpvcpu.model.hosts import Operation, VmKey
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.testing import Behaviour
from tests.cli.schema import errors_in
from tests.hosts.world import agent_of, ask, connected, served, state, vm_in

pytestmark = pytest.mark.qemu

WEB = VmKey("rack1", "web")


def printed(told: dict[str, Any], command: str) -> dict[str, Any]:
    """*told*, which is what *command* prints, with its exit code."""
    assert errors_in({key: each for key, each in told.items() if key != "code"}, command) == [], (command, told)
    return told


async def test_the_documents_of_an_agent_are_those_of_the_commands(tmp_path: Path) -> None:
    async with (
        served() as server,
        vm_in(tmp_path, "web", boot=2) as guest,
        connected(server) as bus,
        agent_of(server, "rack1", tmp_path),
    ):
        await state(bus, WEB, lambda now: now["error"] is None)

        async def asked(operation: Operation, command: str, **request: Any) -> dict[str, Any]:
            return printed(await ask(bus, "rack1", operation, vm="web", **request), command)

        told = await asked(Operation.PLAN, "plan", map="0,2-3")
        assert str(plan_from_json(told).target) == "0,2-3"
        told = await asked(Operation.PLUG, "plug", ids=[2, 3])
        assert [step["proofs"]["present"] > 0 for step in told["steps"]] == [True, True]
        told = await asked(Operation.UNPLUG, "unplug", ids=[3])
        assert [step["joined"] for step in told["steps"]] == [False]
        told = await asked(Operation.SET, "set", map="0-2")
        assert TransitionReport.from_json(told).layout.enabled == VcpuMap([0, 1, 2])
        told = await asked(Operation.STATISTICS, "stats")
        assert [vcpu.id for vcpu in statistics_from_json(told).vcpus] == [0, 1, 2]

        await guest.set_behaviour(Behaviour.refusing(0x82))
        told = await asked(Operation.UNPLUG, "unplug", ids=[2, 1])
        assert [step["verdict"]["kind"] for step in told["steps"]] == ["refused"]
        error = error_from_json(told["error"])
        assert (type(error), code_of(error)) == (UnplugRefusedError, told["code"])
        told = await asked(Operation.UNPLUG, "unplug", ids=[0])
        assert (told["code"], told["steps"]) == (2, [])

        (row,) = (await ask(bus, "rack1", Operation.LIST))["vms"]
        assert errors_in(row, "fleetRow") == []
        assert str(layout_from_json(row).enabled) == "0-2"
