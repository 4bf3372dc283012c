"""Places and placements are what they say, or are refused where they are made."""

from collections.abc import Callable
from typing import Any

import pytest

from qmpvcpu.model.placement import HostFacts, Place, Placement, SchedPolicy, Scheduler
from qmpvcpu.model.vcpumap import VcpuMap

_PLACE = Place.on("0")


def _any(value: object) -> Any:
    """What a caller without a type checker passes."""
    return value


class Whole:
    """An int of another library's, such as numpy's."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __index__(self) -> int:
        return self._number

    def __hash__(self) -> int:
        return hash(self._number)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Placement(_any({True: _PLACE})),
        lambda: Placement(_any({1.0: _PLACE})),
        lambda: Placement(_any({"1": _PLACE})),
        lambda: Placement(_any({None: _PLACE})),
        lambda: Placement(_any({1: "0-1"})),
        lambda: Placement(_any({1: None})),
        lambda: Placement(_any({1: {0}})),
        lambda: Placement(_any([_PLACE])),
        lambda: Placement(emulator=_any("0")),
        lambda: Placement(cpuset=_any("0")),
        lambda: Placement(cpuset=_any({0})),
        lambda: Placement(everywhere=_any("no")),
        lambda: Placement(exclusive=_any("no")),
        lambda: Placement(policy=_any("required")),
        lambda: Placement(core_scheduling=_any("vcpus")),
        lambda: Placement.pinned(_any({True: "0"})),
        lambda: Place(_any("0-3")),
        lambda: Place(_any({0})),
        lambda: Place(_any(0)),
        lambda: Place(scheduler=_any("batch")),
        lambda: Place.on("0", _any(5)),
        lambda: Place.on(_any(5)),
        lambda: Placement.pinned(_any({1: 5})),
        lambda: Scheduler(_any("fifo"), 5),
        lambda: Scheduler(SchedPolicy.FIFO, _any("5")),
        lambda: Scheduler(SchedPolicy.FIFO, _any(1.5)),
        lambda: Scheduler(SchedPolicy.FIFO, priority=True),
        lambda: Scheduler.parse(_any(5)),
    ],
)
def test_what_is_of_another_kind_is_refused_where_it_is_given(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r" is .*, not "):
        make()


def test_a_number_of_another_library_becomes_an_int() -> None:
    placement = Placement(_any({Whole(1): Place(None, Scheduler(SchedPolicy.FIFO, _any(Whole(7))))}))
    assert placement == Placement({1: Place(None, Scheduler.parse("fifo:7"))})
    assert [type(vcpu) for vcpu in placement.vcpus] == [int]


def test_what_is_done_to_the_mapping_later_does_not_count() -> None:
    places = {1: _PLACE}
    placement = Placement(places)
    places[2] = _PLACE
    assert placement.vcpus == {1: _PLACE}


@pytest.mark.parametrize(
    ("cpus", "why"),
    [
        ("2,4", ""),
        ("0", ""),
        ("1", "host CPU 1 is offline (chcpu --enable 1)"),
        ("0-3", "host CPUs 1,3 are offline (chcpu --enable 1,3)"),
        ("6,8-9", "this host has no CPUs 8-9: it has 0-7"),
        ("6", "the cgroup of QEMU (/vms) does not allow host CPU 6, only 0,2,4"),
        ("2-7,^3", "the cgroup of QEMU (/vms) does not allow host CPUs 5-7, only 0,2,4"),
    ],
)
def test_host_cpus_that_cannot_be_had_are_named_also_in_the_middle(cpus: str, why: str) -> None:
    whole, online, allowed = map(VcpuMap.parse, ("0-7", "0,2,4-7", "0,2,4"))
    host = HostFacts(existing=whole, online=online, allowed=allowed, cgroup="/vms")
    assert host.why_not(Place.on(cpus)) == why
    placement = Placement.pinned({3: cpus})
    assert placement.why_not([3], host) == (f"its place is host CPUs {Place.on(cpus).cpus}: {why}" if why else "")


@pytest.mark.parametrize(
    ("cpus", "says"), [([-1], "a host CPU is 0 to 16383"), ("0-99999", "a host CPU is 0 to 16383")]
)
def test_what_is_no_set_of_host_cpus_is_not_said_of_vcpus(cpus: Any, says: str) -> None:
    with pytest.raises(ValueError, match="not a set of host CPUs") as caught:
        Place.on(cpus)
    assert says in str(caught.value)


def test_a_priority_is_written_in_digits() -> None:
    with pytest.raises(ValueError, match="not a scheduler"):
        Scheduler.parse("fifo:\u0663")
