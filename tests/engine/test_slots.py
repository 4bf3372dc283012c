"""The table of slots: one change at a time, in place."""

import pytest

from qmpvcpu import Layout
from qmpvcpu.engine.vmstate import SlotTable
from tests.model.test_layout import small_layout


def test_a_plug_comes_last_and_an_unplug_closes_the_gap() -> None:
    table = SlotTable(small_layout(0, 3, 2))
    before = table.layout
    table.put(table[3].emptied())
    without = table.layout
    assert without.order == (0, 2)
    assert without[2].order == 2
    table.put(table[3].filled("/machine/peripheral/vcpu3"))
    assert table.layout.order == (0, 2, 3)
    assert table.layout.generation == before.generation + 2
    assert table.layout[3].host_tid is None
    assert before.enabled == {0, 2, 3}  # the old one is as it was


def test_another_cpu_in_the_same_slot_is_a_new_one() -> None:
    table = SlotTable(small_layout(0, 1, 2))
    table.put(table[1].filled("/machine/peripheral/foreign"))
    assert table.layout.order == (0, 2, 1)
    assert table.layout[1].device_id == "foreign"


def test_what_is_told_of_a_slot_leaves_its_place_in_the_order() -> None:
    table = SlotTable(small_layout(0, 1, 2))
    table.put(table[1].seen((7,)))
    assert table.layout.order == (0, 1, 2)
    assert table.layout[1].host_tid == 7


def test_a_slot_that_empties_is_no_longer_pending() -> None:
    table = SlotTable(small_layout(0, 1, 2))
    table.mark(1, pending=True)
    table.mark(2, pending=True)
    table.put(table[1].emptied())
    assert table.layout.pending == {2}


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
