"""What a save costs, counted; how long it takes is measured by ``tests/bench.sh``."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.domainxml import Metadata, render
from qmpvcpu.model.transition import Action, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap
from tests.counting import calls
from tests.domainxml.examples import layout_of
from tests.record.conftest import OpenRecord


def all_plugged_from_one(slots: int) -> Intent:
    steps = tuple(Step(Action.PLUG, VcpuMap([each])) for each in range(1, slots))
    return Intent(VcpuMap([0]), VcpuMap(range(slots)), steps)


@pytest.mark.parametrize("intended", [True, False])
def test_rendering_costs_in_proportion_to_the_slots(intended: bool) -> None:
    cost = {}
    for slots in (64, 256):
        layout = layout_of(slots, range(slots), boot=1)
        whole = all_plugged_from_one(slots)
        metadata = Metadata(intent=whole if intended else None, desired=whole.target).with_layout(layout)
        cost[slots] = calls(partial(render, layout, metadata=metadata))
    assert cost[256] < 4.4 * cost[64]


async def test_a_save_is_one_hop_to_a_thread(
    open_record: OpenRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = await open_record(tmp_path / "vm.xml")
    loop = asyncio.get_running_loop()
    hop = loop.run_in_executor
    hops: list[object] = []

    def count_and_hop(executor: Any, work: Any, *args: Any) -> Any:
        hops.append(work)
        return hop(executor, work, *args)

    monkeypatch.setattr(loop, "run_in_executor", count_and_hop)
    await record.write(layout_of(4, [0], boot=1))
    assert len(hops) == 1
