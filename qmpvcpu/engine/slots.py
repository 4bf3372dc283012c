"""The slots of one VM as they change, and a Layout of them for whoever looks."""

from collections.abc import Iterable

from qmpvcpu.model.layout import Layout, Slot


class SlotTable:
    """The slots of one VM as they change; a Layout is made of them when one is asked for, and kept until they change.

    A change takes the same time however many slots there are, and a burst of changes costs one Layout.

    Attributes:
        generation: Counts the changes; a Layout has it as its own.
    """

    def __init__(self, layout: Layout) -> None:
        self.generation = layout.generation
        self._layout: Layout | None = layout
        self._vm = layout.vm
        self._slots = {slot.first: slot for slot in layout.slots}  # and so by ascending id, for ever
        self._creation = dict.fromkeys(layout.creation)
        self._pending = set(layout.pending_slots)

    def __getitem__(self, first: int) -> Slot:
        return self._slots[first]

    @property
    def layout(self) -> Layout:
        """All slots as they are now."""
        if self._layout is None:
            self._layout = Layout(
                vm=self._vm,
                slots=tuple(self._slots.values()),
                creation=tuple(self._creation),
                pending_slots=frozenset(self._pending),
                generation=self.generation,
            )
        return self._layout

    def put(self, slot: Slot) -> None:
        """Put *slot* in the place of the one with its first id; the newest, if it is newly filled."""
        if slot.qom_path != self._slots[slot.first].qom_path:
            self._creation.pop(slot.first, None)
        if slot.present:
            self._creation.setdefault(slot.first)
        else:
            self._pending.discard(slot.first)
        self._slots[slot.first] = slot
        self._changed()

    def mark(self, first: int, *, pending: bool) -> None:
        """Note whether a removal of the slot of vCPU *first* is accepted and unanswered."""
        if pending is not (first in self._pending):
            self._pending ^= {first}
            self._changed()

    def reorder(self, creation: Iterable[int]) -> None:
        """Take QEMU's word on the order in which it created the CPUs that are there."""
        self._creation = dict.fromkeys(creation)
        self._layout = None

    def _changed(self) -> None:
        self.generation += 1
        self._layout = None
