"""The recorded QEMUs in fixtures/captures, as the tests read them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpvcpu import Layout, qapi
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.qapi import build_fixed_slots, build_slots, creation_order

FOLDER = Path(__file__).parents[1] / "fixtures" / "captures"


@dataclass(frozen=True)
class Capture:
    """One recorded QEMU."""

    name: str
    data: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def arch(self) -> str:
        return str(self.data["argv"][0]).removeprefix("qemu-system-")

    def replies(self, command: str) -> list[Any]:
        return [step["return"] for step in self.data["steps"] if step["execute"] == command and "return" in step]

    def layouts(self) -> Iterator[Layout]:
        """Every layout that was read: before and after the plugs in it."""
        cpus = self.replies("query-hotpluggable-cpus")
        vm = VmInfo("test", self.arch, "q35", "tcg", (10, 0, 2), can_plug=bool(cpus))
        for number, reply in enumerate(self.replies("query-cpus-fast")):
            threads = qapi.parse_cpus_fast(reply)
            if cpus:
                slots = build_slots(qapi.parse_hotpluggable_cpus(cpus[number]), threads)
            else:
                slots = build_fixed_slots(threads)
            yield Layout(vm=vm, slots=slots, creation=creation_order(slots, threads))


def all_captures() -> list[Capture]:
    """All recordings of a QEMU that started and was asked; transcripts (wire) are another kind."""
    found = [Capture(path.stem, json.loads(path.read_text())) for path in sorted(FOLDER.glob("*.json"))]
    return [capture for capture in found if capture.data.get("steps")]
