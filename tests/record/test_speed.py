"""What a save costs; ``pytest -s`` prints it. The bounds are far above it: they catch a change of kind."""

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.domainxml import Metadata, render
from qmpvcpu.model import Action, Intent, Step, VcpuMap
from tests.domainxml.examples import layout_of
from tests.record.conftest import OpenRecord

ROUNDS = 15


def all_plugged_from_one(slots: int) -> Intent:
    steps = tuple(Step(Action.PLUG, VcpuMap([each])) for each in range(1, slots))
    return Intent(VcpuMap([0]), VcpuMap(range(slots)), steps)


@pytest.mark.parametrize("slots", [64, 240])
async def test_an_intent_of_all_vcpus_and_its_outcome_cost_milliseconds(
    open_record: OpenRecord, tmp_path: Path, slots: int, record_property: Callable[[str, object], None]
) -> None:
    layout = layout_of(slots, range(slots), boot=1)
    whole = all_plugged_from_one(slots)
    record = await open_record(tmp_path / "vm.xml", uuid=None)
    for name, intent in (("intent", whole), ("outcome", None)):
        rendering, writing = [], []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            render(layout, metadata=Metadata.of(layout, intent=intent, desired=whole.target))
            rendered = time.perf_counter()
            await record.write(layout, intent=intent, desired=whole.target)
            rendering.append(rendered - begun)
            writing.append(time.perf_counter() - rendered)
        for what, seconds in (("rendering", rendering), ("rendering and saving", writing)):
            told = f"{slots} slots, {what} the {name}: {statistics.median(seconds) * 1000:.2f} ms"
            sys.stdout.write(f"\n{told}")
            record_property("measured", told)
        assert min(rendering) < 0.02
        assert min(writing) < 0.1


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
