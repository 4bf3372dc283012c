"""A plan, and what a document says of it."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.documents import as_line, plan_from_json, plan_json
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.verdicts import Denied
from qmpvcpu.planning.plan import Plan, plan_map
from tests.documents.values import any_json, reasons, texts
from tests.model.values import layouts, maps
from tests.planning.situations import situation, situations

paths = st.none() | texts
steps = st.builds(Step, st.sampled_from(Action), maps.filter(bool), paths, st.booleans(), st.booleans())
some_layouts = layouts()
plans = st.builds(
    Plan,
    maps,
    maps,
    st.lists(steps, max_size=6).map(tuple),
    st.lists(st.builds(Denied, maps, reasons, texts), max_size=3).map(tuple),
    st.lists(texts, max_size=3).map(tuple),
)


def there_and_back(plan: Plan, layout: Layout | None = None) -> Plan:
    return plan_from_json(json.loads(as_line(plan_json(plan))), layout)


@given(plans)
def test_a_plan_comes_back_as_it_was(plan: Plan) -> None:
    assert there_and_back(plan) == plan


@given(situations(), maps)
def test_with_the_layout_it_explains_itself_as_it_did(now: Any, target: VcpuMap) -> None:
    plan = plan_map(now, target)
    back = there_and_back(plan, now.layout)
    assert back == plan
    assert str(back) == str(plan)


@given(plans, some_layouts)
def test_a_plan_from_elsewhere_explains_itself_with_any_layout_or_none(plan: Plan, layout: Layout) -> None:
    assert str(plan)
    assert str(there_and_back(plan, layout))


def test_without_the_layout_a_plan_says_what_is_known_of_its_steps() -> None:
    plan = plan_map(situation({0: "boot", 2: "ours", 3: "boot"}, pending=(2,)), VcpuMap([0, 1, 2]))
    assert str(replace(plan, slots=(), pending_slots=frozenset(), warnings=())).splitlines() == [
        "vCPUs 0,2-3 -> 0-2: 1 to plug, 1 to unplug, 1 to keep",
        "  plug   1  (device_add)",
        "  keep   2  (its removal is pending: the guest's answer is awaited)",
        "  unplug 3  (the guest is asked to give up /machine/unattached/device[2])",
    ]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("steps", [{"action": "destroy"}], r"'steps': \[0\]: 'action'"),
        ("start", "0-99999", "'start'"),
        ("denied", [{"kind": "denied", "ids": "1", "reason": "why not", "detail": ""}], r"'denied': \[0\]: 'reason'"),
        ("warnings", "none", "'warnings': \"none\" is not a list"),
    ],
)
def test_what_is_no_plan_is_refused(key: str, value: Any, why: str) -> None:
    told = plan_json(Plan(VcpuMap(), VcpuMap(), ()))
    with pytest.raises(ValueError, match=why):
        plan_from_json(told | {key: value})
    del told[key]
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        plan_from_json(told)


@given(plans, st.data())
def test_whatever_is_changed_in_a_plan_it_is_read_or_refused(plan: Plan, data: st.DataObject) -> None:
    told = plan_json(plan)
    told[data.draw(st.sampled_from(sorted(told)))] = data.draw(any_json)
    try:
        back = plan_from_json(told)
    except ValueError:
        return
    assert str(back)
