import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import Layout
from qmpvcpu.documents import as_line, layout_from_json, layout_json, state_json
from qmpvcpu.model.options import Proof
from qmpvcpu.model.verdicts import OstAnswer
from tests.documents.values import any_json
from tests.layouts import layout
from tests.model.values import layouts


def there_and_back(given: Layout) -> Layout:
    return layout_from_json(json.loads(as_line(layout_json(given))))


def as_seen(given: Layout) -> Layout:
    """*given* as the library makes them: what is proven of a CPU was seen at a time."""
    slots = (each if each.proven_at is not None else replace(each, proven=None) for each in given.slots)
    return replace(given, slots=tuple(slots))


@given(layouts().map(as_seen))
def test_a_layout_comes_back_as_it_was(given: Layout) -> None:
    assert there_and_back(given) == given


@given(layouts())
def test_a_layout_that_nobody_has_seen_comes_back_with_all_that_is_told_of_it(given: Layout) -> None:
    assert layout_json(there_and_back(given)) == layout_json(given)


def test_a_proof_that_was_not_seen_to_come_is_no_other_than_it_was() -> None:
    plugged = layout("0-2")
    answered = plugged.slots[2].answered(OstAnswer(source=0x200, code=0))
    given = replace(plugged, slots=(*plugged.slots[:2], answered, *plugged.slots[3:]))
    assert [vcpu.proof for vcpu in given][:3] == [Proof.PRESENT, Proof.PRESENT, Proof.ACKNOWLEDGED]
    assert there_and_back(given) == given


def test_a_slot_of_many_vcpus_is_one_again() -> None:
    given = layout("0,4", slots=3, count=4, pending=(4,), first_tid=100)
    back = there_and_back(given)
    assert back == given
    assert [(slot.first, slot.count) for slot in back.slots] == [(0, 4), (4, 4), (8, 4)]
    assert back.slot_of(5).host_tids == (104, 105, 106, 107)


def test_the_map_in_short_is_part_of_the_whole() -> None:
    given = layout("0,2-3", pending=(3,))
    assert state_json(given) == {"max": 8, "enabled": "0,2-3", "pending": "3"}
    assert state_json(given).items() <= layout_json(given).items()


def changed(document: dict[str, Any], vcpu: int, **values: Any) -> dict[str, Any]:
    document["vcpus"][vcpu] |= values
    return document


@pytest.mark.parametrize(
    ("vcpu", "values", "why"),
    [
        (3, {"slot": 3}, r"'vcpus': 'order'"),
        (5, {"slot": 5, "id": 4}, r"'vcpus': \[5\]: 'slot'"),
        (3, {"slot": 0}, r"'vcpus': \[3\]: 'slot': 0 is not the first"),
        (3, {"id": 4}, r"'vcpus': \[3\]: 'slot'"),
        (5, {"id": 6, "slot": 6}, r"'slots': \[3\]: 'first': 6 is not 5"),
        (3, {"type": "other-x86_64-cpu"}, r"'vcpus': \[3\]: 'type': it is another than that of vCPU 2"),
        (3, {"props": {"core-id": -1}}, r"'vcpus': \[3\]: 'props': 'core-id'"),
        (3, {"qom_path": None}, r"'vcpus': \[3\]: 'qom_path'"),
        (3, {"qom_path": "/etc/passwd"}, r"'vcpus': \[3\]: 'qom_path'"),
        (3, {"pending": True}, r"'vcpus': \[3\]: 'pending'"),
        (3, {"host_tid": "1"}, r"'vcpus': \[3\]: 'host_tid'"),
        (2, {"proof": "believed"}, r"'vcpus': \[2\]: 'proof'"),
        (0, {"slot": 1}, r"'vcpus': \[0\]: 'slot'"),
        (0, {"id": True}, r"'vcpus': \[0\]: 'id'"),
    ],
)
def test_a_vcpu_that_is_not_one_of_its_slot_is_named(vcpu: int, values: dict[str, Any], why: str) -> None:
    document = layout_json(layout("0,2", slots=3, count=2))
    with pytest.raises(ValueError, match=why):
        layout_from_json(changed(document, vcpu, **values))


@pytest.mark.parametrize("order", [0, 1, 3, None])
def test_the_places_in_the_order_of_creation_are_each_there_once(order: int | None) -> None:
    document = changed(layout_json(layout("0-1", slots=3)), 1, order=order)
    if order is None:
        assert layout_from_json(document).creation == (0,)  # as where QEMU does not tell
    else:
        with pytest.raises(ValueError, match="each once"):
            layout_from_json(document)


def test_a_vcpu_that_is_not_there_has_no_place_in_that_order() -> None:
    document = changed(layout_json(layout("0-1", slots=3)), 2, order=3)
    with pytest.raises(ValueError, match="'creation'"):
        layout_from_json(document)


def test_more_vcpus_than_a_vm_can_have_are_refused() -> None:
    document = layout_json(layout("0", slots=1))
    document["vcpus"] = [document["vcpus"][0] | {"id": each} for each in range(16386)]
    with pytest.raises(ValueError, match="16384"):
        layout_from_json(document)


@pytest.mark.parametrize("key", ["vm", "generation", "vcpus"])
def test_what_is_missing_is_named(key: str) -> None:
    document = layout_json(layout("0"))
    del document[key]
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        layout_from_json(document)


@given(layouts(), st.data())
def test_whatever_is_changed_in_a_document_it_is_read_or_refused(given: Layout, data: st.DataObject) -> None:
    document = layout_json(given)
    part = data.draw(st.sampled_from([document, document["vm"], *document["vcpus"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(any_json)
    try:
        back = layout_from_json(document)
    except ValueError:
        return
    back.check_foreign()
    as_line(layout_json(back))
