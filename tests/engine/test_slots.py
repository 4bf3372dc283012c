"""The table of slots: what Layout.with_slot does one by one, in place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import Layout
from qmpvcpu.engine.slots import SlotTable
from tests.model.test_layout import small_layout

changes = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["ours", "foreign", "empty"])), max_size=12)


@given(changes=changes)
def test_changes_one_by_one_and_in_place_lead_to_the_same_layout(changes: list[tuple[int, str]]) -> None:
    layout = small_layout(0, 2)
    table = SlotTable(layout)
    for first, change in changes:
        slot = table[first]
        if change == "empty":
            slot = slot.emptied()
        else:
            slot = slot.filled(slot.new_qom_path if change == "ours" else "/machine/peripheral/foreign")
        table.put(slot)
        layout = layout.with_slot(slot)
    assert table.layout == layout


def test_a_layout_is_kept_until_something_changes_and_never_changes_itself() -> None:
    table = SlotTable(small_layout(0, 1))
    before = table.layout
    assert table.layout is before
    table.mark(1, pending=False)
    assert table.layout is before, "it was not pending before either"
    table.mark(1, pending=True)
    assert table.layout.pending == {1}
    assert table.layout.generation == before.generation + 1
    assert not before.pending
    table.put(table[1].emptied())
    assert not table.layout.pending
    assert before.enabled == {0, 1}


def test_the_order_of_creation_is_qemu_s_and_is_no_change_of_the_layout() -> None:
    table = SlotTable(small_layout(0, 1, 2))
    generation = table.generation
    table.reorder([0, 2, 1])
    assert table.layout.order == (0, 2, 1)
    assert table.layout.generation == generation


def test_there_is_no_other_slot_than_those_of_the_first_layout() -> None:
    table = SlotTable(small_layout(0))
    assert isinstance(table.layout, Layout)
    with pytest.raises(KeyError):
        table[99]
