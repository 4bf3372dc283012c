"""What vCPUs have done, as values: KVM's counters, JSON there and back, and rates between two readings."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.counters import KvmCounters
from qmpvcpu.model.statistics import VcpuRates, VcpuStatistics, VmStatistics

numbers = st.integers(0, 2**64 - 1)
seconds = st.none() | st.floats(0, 1e9)
counters = st.dictionaries(
    st.from_regex("[a-z][a-z0-9_]{0,20}", fullmatch=True),
    numbers | st.booleans() | st.lists(numbers, max_size=4).map(tuple),
    max_size=4,
).map(KvmCounters)
readings = st.builds(
    VmStatistics,
    st.text(max_size=12),
    st.floats(0, 1e10),
    st.floats(0, 1e9),
    st.lists(
        st.builds(
            VcpuStatistics,
            st.integers(0, 4095),
            *(st.none() | st.integers(1, 2**31 - 1), seconds, seconds, seconds, st.none() | numbers),
            *(st.none() | st.booleans(), st.none() | st.integers(0, 4095), counters),
        ),
        max_size=3,
    ).map(tuple),
    st.text(max_size=12),
)

BEFORE = VcpuStatistics(3, 77, 10.0, 1.0, 0.5, 100, None, 0, KvmCounters({"exits": 1000, "blocking": False}))


def reading(clock: float, *vcpus: VcpuStatistics) -> VmStatistics:
    return VmStatistics("vm", 1.8e9 + clock, clock, vcpus)


def rates(before: VcpuStatistics | None, after: VcpuStatistics, seconds: float = 2.0) -> VcpuRates:
    earlier = reading(100.0, *([] if before is None else [before]))
    return reading(100.0 + seconds, after).since(earlier)[after.id]


@given(readings)
def test_any_reading_comes_back_from_json_as_it_was(statistics: VmStatistics) -> None:
    assert from_json(VmStatistics, json.loads(json.dumps(to_json(statistics)))) == statistics


def test_histograms_are_lists_in_json() -> None:
    there = to_json(replace(BEFORE, kvm=KvmCounters({"halt_wait_hist": (0, 3), "guest_mode": True})))
    assert there["kvm"] == {"halt_wait_hist": [0, 3], "guest_mode": True}


@pytest.mark.parametrize(
    ("counter", "said"),
    [
        ({"exits": -1}, "'exits': -1 has not 64 bits"),
        ({"exits": 2**64}, "has not 64 bits"),
        ({"exits": 1.5}, "'exits': 1.5 is no number, truth value or histogram"),
        ({"exits": None}, "'exits': null is no number, truth value or histogram"),
        ({"exits": {"a": 1}}, "is no number, truth value or histogram"),
        ({"hist": [1, True]}, "'hist': a column of .* is no number of 64 bits"),
        ({"hist": [1, [2]]}, "is no number of 64 bits"),
        ({"hist": [1, -2]}, "is no number of 64 bits"),
        ({"hist": [2**64]}, "is no number of 64 bits"),
        ({"hist": [0] * 1025}, "'hist': a histogram of 1025 columns has more than 1024"),
        ({"a\x1b[31m": 1}, "is not a name of letters"),
        ({"": 1}, "is not a name of letters"),
        ({"x" * 129: 1}, "is not a name of letters"),
        ({f"n{number}": 1 for number in range(513)}, "513 counters of one vCPU are more than 512"),
    ],
)
def test_what_kvm_cannot_have_counted_is_refused(counter: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        KvmCounters(counter)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ValueError, match="'kvm'"):
        from_json(VcpuStatistics, {**to_json(BEFORE), "kvm": counter})


def test_counters_are_compared_and_hashed_by_what_they_are() -> None:
    one, other = KvmCounters({"exits": 1, "hist": [1, 2]}), KvmCounters({"hist": (1, 2), "exits": 1})
    assert one == other
    assert len({one, other, KvmCounters({})}) == 2


def test_shares_are_of_the_time_between_the_readings() -> None:
    after = VcpuStatistics(3, 77, 11.0, 1.5, 0.75, 140, None, 1, KvmCounters({"exits": 1500, "blocking": True}))
    assert rates(BEFORE, after) == VcpuRates(3, 0.5, 0.25, 0.125, 20.0, {"exits": 250.0})
    assert rates(BEFORE, after).idle == 0.25
    assert not rates(BEFORE, after).restarted


def test_no_share_is_more_than_the_whole_though_the_clock_is_read_before_the_thread() -> None:
    after = replace(BEFORE, run_s=12.01)
    assert rates(BEFORE, after).run == 1.0
    assert rates(BEFORE, after).idle == 0.0


def test_what_was_not_read_has_no_share() -> None:
    blind = VcpuStatistics(3, 77, kvm=KvmCounters({"exits": 1500}))
    assert rates(replace(blind, kvm=BEFORE.kvm), blind) == VcpuRates(3, kvm={"exits": 250.0})
    assert rates(BEFORE, blind).run is None
    assert rates(blind, BEFORE).idle is None
    unnumbered = replace(blind, host_tid=None)  # its thread is read by the next reading
    assert not rates(unnumbered, BEFORE).restarted


@pytest.mark.parametrize("tid", [78, 77], ids=["another tid", "the same tid, given to another thread"])
def test_a_vcpu_that_was_plugged_again_begins_at_its_birth(tid: int) -> None:
    after = VcpuStatistics(3, tid, 1.0, 0.5, 0.0, 10, None, 0, KvmCounters({"exits": 1500}))
    assert rates(BEFORE, after) == VcpuRates(3, 0.5, 0.25, 0.0, 5.0, {}, restarted=True)


def test_a_vcpu_that_was_plugged_since_begins_at_its_birth() -> None:
    after = VcpuStatistics(3, 78, 1.0, 0.5, None, 10)
    assert rates(None, after) == VcpuRates(3, 0.5, 0.25, 0.0 if after.wait_s else None, 5.0, {}, restarted=True)


def test_a_vcpu_that_was_there_and_not_read_has_no_shares() -> None:
    assert rates(None, BEFORE) == VcpuRates(3, restarted=True)


def test_a_counter_that_fell_is_left_out() -> None:
    after = replace(BEFORE, kvm=KvmCounters({"exits": 999, "new": 5}))
    assert rates(BEFORE, after).kvm == {}


@pytest.mark.parametrize("clock", [100.0, 99.0])
def test_rates_need_an_earlier_reading(clock: float) -> None:
    with pytest.raises(ValueError, match="are the two swapped"):
        reading(clock, BEFORE).since(reading(100.0, BEFORE))


def test_a_vcpu_is_found_by_its_id() -> None:
    assert reading(1.0, BEFORE)[3] is BEFORE
    with pytest.raises(KeyError, match="vCPU 4 is not plugged"):
        reading(1.0, BEFORE)[4]


@pytest.mark.parametrize(
    ("counters", "exits"),
    [({"exits": 7}, 7), ({"sum_exits": 7}, 7), ({"halt_exits": 7}, None), ({"exits": (1, 2)}, None)],
    ids=["x86", "powerpc", "s390x", "histogram"],
)
def test_exits_have_the_name_of_their_architecture(counters: dict[str, int], exits: int | None) -> None:
    assert KvmCounters(counters).exits == exits
