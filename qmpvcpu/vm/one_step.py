"""What is told of the plug, or the unplug, of single vCPUs, for those that make documents of it."""

import asyncio
import time
from typing import Any, Self

from qmpvcpu.documents.steps import plug_json
from qmpvcpu.errors import PlacementError, UnprovenError
from qmpvcpu.events import Event, VcpuPlaced, VcpuPlugged, VcpuProven
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Proof
from qmpvcpu.model.transition import ProofSeconds
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.subscribers import EventStream


def joins(vm: VcpuController, vcpu: int) -> bool:
    """Return True if an unplug of *vcpu* would only wait for the answer to a removal that is pending already."""
    if vcpu not in vm.layout.pending:
        return False
    planned = vm.plan(vm.layout.enabled - vm.layout.slot_of(vcpu).ids)
    return any(step.joins and vcpu in step.ids for step in planned.steps)


class PlugClock:
    """Takes the seconds from now, when a plug is sent, until *events* tell of each proof of it, and of its place.

    Enter it while the plug runs.
    """

    def __init__(self, events: EventStream) -> None:
        self._events = events
        self._sent = time.monotonic()
        self._seconds: dict[VcpuMap, dict[str, float]] = {}
        self._placed: dict[VcpuMap, tuple[float | None, str]] = {}

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self) -> None:
        """Take events in as they come."""
        async for event in self._events:
            self._take(event)

    @property
    def seconds(self) -> float:
        """How long it is since the plug was sent."""
        return time.monotonic() - self._sent

    def proofs(self, ids: VcpuMap) -> ProofSeconds:
        """Return what the events so far prove of the plug of *ids*, and when."""
        self._take_all()
        return ProofSeconds(**self._seconds.get(ids, {}))

    def placed(self, ids: VcpuMap) -> tuple[float | None, str]:
        """Return when the threads of *ids* were in their place, else None and why not; "": nothing is wanted."""
        self._take_all()
        return self._placed.get(ids, (None, ""))

    def step_json(self, layout: Layout, ended: VcpuMap | UnprovenError | PlacementError) -> dict[str, Any]:
        """Return the step that has just *ended*, as a document has it; *layout* is the VM after it."""
        seconds = self.seconds
        ids = ended if isinstance(ended, VcpuMap) else ended.ids
        placed, unplaced = self.placed(ids)
        return plug_json(layout, ended, seconds=seconds, proofs=self.proofs(ids), placed=placed, unplaced=unplaced)

    def _take_all(self) -> None:
        while (event := self._events.take()) is not None:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case VcpuPlaced(why_not=why_not):
                self._placed[event.ids] = (None if why_not else self.seconds), why_not
                return
            case VcpuPlugged():
                proof = Proof.PRESENT
            case VcpuProven(proof=proof, seconds=float()):
                pass
            case _:
                return
        self._seconds.setdefault(event.ids, {})[proof.value] = self.seconds
