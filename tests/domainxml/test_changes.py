"""What the next boot shall have, computed: libvirt's own changes of a persistent definition, and where we differ."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.domainxml import parse
from qmpvcpu.domainxml.domain import DomainVcpu, DomainVcpus, NumaCell, ThreadSched
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.next_boot import slot_of, with_count, with_map, with_max, with_state
from qmpvcpu.errors import ConfigDeniedError, DenialReason, InvalidMapError, Outcome
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from tests.domainxml.domains import broken, document, domain_of_rows, domains, said, started

TABLE: list[tuple[str, Callable[[DomainVcpus], DomainVcpus], str, str]] = [
    # 0: QEMU starts with it. +: plugged before the guest runs. -: off. A letter: plugged in this order.
    ("setVcpu in", lambda at: with_state(at, [1], enabled=True), "0---", "0+--"),
    ("setVcpu in, beside a hole", lambda at: with_state(at, [3], enabled=True), "0---", "0--+"),
    ("setVcpu in, of two", lambda at: with_state(at, [1, 3], enabled=True), "0---", "0+-+"),
    ("setVcpu in, there already", lambda at: with_state(at, [1], enabled=True), "00--", "00--"),
    ("setVcpu in, of vCPU 0", lambda at: with_state(at, [0], enabled=True), "00--", "00--"),
    ("setVcpu out", lambda at: with_state(at, [1], enabled=False), "0+--", "0---"),
    ("setVcpu out, of the last boot vCPU", lambda at: with_state(at, [3], enabled=False), "0000", "000-"),
    ("setVcpu out, of all followers", lambda at: with_state(at, [1, 2, 3], enabled=False), "0000", "0---"),
    ("setVcpu out, before boot vCPUs", lambda at: with_state(at, [1], enabled=False), "0000", "0-++"),
    ("setVcpu out, gone already", lambda at: with_state(at, [2], enabled=False), "00--", "00--"),
    ("setVcpus up", lambda at: with_count(at, 3), "0---", "000-"),
    ("setVcpus up, as hotpluggable", lambda at: with_count(at, 3, hotpluggable=True), "0---", "0++-"),
    ("setVcpus up, after one that is", lambda at: with_count(at, 4), "0+--", "0+++"),
    ("setVcpus up, into a hole", lambda at: with_count(at, 3), "0-+-", "00+-"),
    ("setVcpus up, into a hole and beyond", lambda at: with_count(at, 4), "0-+-", "00++"),
    ("setVcpus down", lambda at: with_count(at, 1), "0000", "0---"),
    ("setVcpus down, highest first", lambda at: with_count(at, 2), "0-++", "0-+-"),
    ("setVcpus, so many already", lambda at: with_count(at, 2), "0--+", "0--+"),
    ("a map", lambda at: with_map(at, [0, 2]), "00--", "0-+-"),
    ("a map that keeps what is there", lambda at: with_map(at, [0, 1, 3]), "00+-", "00-+"),
    ("a map that is so already", lambda at: with_map(at, [0, 2]), "0-+-", "0-+-"),
    ("more room", lambda at: with_max(at, 6), "00+-", "00+---"),
    ("less room", lambda at: with_max(at, 2), "0-++", "0-"),
    ("as much room", lambda at: with_max(at, 4), "0-++", "0-++"),
    ("a map keeps the order", lambda at: with_map(at, [0, 1, 2, 3]), "0c-b", "0cdb"),
    ("who leaves lets the others move up", lambda at: with_map(at, [0, 1, 2]), "0dcb", "0cb-"),
    ("who is after a hole keeps the order", lambda at: with_map(at, [0, 2, 3]), "0bcd", "0-bc"),
    ("setVcpus up, by order", lambda at: with_count(at, 4), "0-b-", "00cd"),
    ("less room keeps the order", lambda at: with_max(at, 3), "0dcb", "0cb"),
]


@pytest.mark.parametrize(("what", "change", "before", "after"), TABLE, ids=[row[0] for row in TABLE])
def test_a_change(what: str, change: Callable[[DomainVcpus], DomainVcpus], before: str, after: str) -> None:
    domain = domain_of_rows(before)
    changed = change(domain)
    assert said(changed) == after, what
    assert (changed is domain) == (before == after)


def test_boot_vcpus_after_a_hole_come_before_those_that_were_plugged_later() -> None:
    rows = (
        *(DomainVcpu(each, enabled=True, hotpluggable=False, order=each + 1) for each in range(3)),
        DomainVcpu(3, enabled=True, hotpluggable=True, order=5),
        DomainVcpu(4, enabled=True, hotpluggable=True, order=4),
    )
    changed = with_state(replace(domain_of_rows("0"), vcpus=rows, individual=True), [1], enabled=False)
    assert said(changed) == "0-bdc"
    assert started(changed) == (0, 2, 4, 3)


def test_a_document_that_libvirt_would_not_start_is_mended_by_any_change() -> None:
    rows = (
        DomainVcpu(0, enabled=True, hotpluggable=False),
        DomainVcpu(1, enabled=False, hotpluggable=True),
        DomainVcpu(2, enabled=True, hotpluggable=False),
    )
    started_late = replace(domain_of_rows("0"), vcpus=rows, individual=True)
    assert said(with_count(started_late, 2)) == "0-+"
    twice = replace(
        started_late, vcpus=tuple(DomainVcpu(each, each < 3, each > 0, min(each + 1, 2)) for each in range(3))
    )
    assert broken(twice) == [DomainRule.ORDER_TWICE]
    assert said(with_map(twice, [0, 1, 2])) == "0bc"


def test_a_count_that_only_takes_away_needs_no_rows() -> None:
    assert not with_count(domain_of_rows("0000"), 2).individual
    assert not with_count(domain_of_rows("00--"), 4).individual
    assert with_count(domain_of_rows("00--"), 4, hotpluggable=True).individual
    assert with_state(domain_of_rows("0000"), [3], enabled=False).individual


def test_less_room_takes_the_pins_and_schedulers_of_those_above_with_it() -> None:
    domain = domain_of_rows(
        "00----",
        pins={1: VcpuMap([0]), 4: VcpuMap([1])},
        scheds={1: ThreadSched("batch"), 4: ThreadSched("idle"), 5: ThreadSched("batch")},
    )
    changed = with_max(domain, 3)
    assert changed.pins == {1: {0}}
    assert changed.scheds == {1: ThreadSched("batch")}


def test_more_room_is_in_the_first_numa_cell() -> None:
    cells = (NumaCell(0, VcpuMap([0, 2]), 1024), NumaCell(1, VcpuMap([1, 3]), 1024))
    changed = with_max(domain_of_rows("00--", numa=cells), 6)
    assert [str(cell.cpus) for cell in changed.numa] == ["0,2,4-5", "1,3"]


CORES = domain_of_rows("00000000--------", arch="ppc64", machine="pseries", topology=Topology(16, 2, threads=8))
NUMA = domain_of_rows("00--", numa=(NumaCell(0, VcpuMap([0, 1, 2, 3]), 1024),))
DENIED: list[tuple[str, Callable[[], object], DenialReason, tuple[int, ...], str]] = [
    (
        "0",
        lambda: with_map(domain_of_rows("00-"), [1]),
        DenialReason.BOOT_VCPU,
        (0,),
        "map 1 at the next boot denied",
    ),
    ("none", lambda: with_map(domain_of_rows("00-"), []), DenialReason.BOOT_VCPU, (0,), "map empty at"),
    (
        "0 out",
        lambda: with_state(domain_of_rows("00-"), [0], enabled=False),
        DenialReason.BOOT_VCPU,
        (0,),
        "unplug of",
    ),
    (
        "9 in",
        lambda: with_state(domain_of_rows("0-"), [1, 9], enabled=True),
        DenialReason.UNKNOWN_VCPU,
        (9,),
        "0 to 1",
    ),
    ("9", lambda: with_map(domain_of_rows("0-"), [0, 9]), DenialReason.UNKNOWN_VCPU, (9,), "0 to 1"),
    ("slot 9", lambda: slot_of(domain_of_rows("0-"), 9), DenialReason.UNKNOWN_VCPU, (9,), "plug of vCPU 9"),
    ("slot -1", lambda: slot_of(domain_of_rows("0-"), -1), DenialReason.UNKNOWN_VCPU, (), "0 to 1"),
    (
        "count 0",
        lambda: with_count(domain_of_rows("0-"), 0),
        DenialReason.UNKNOWN_VCPU,
        (),
        "count 0 at the next boot",
    ),
    ("count 3", lambda: with_count(domain_of_rows("0-"), 3), DenialReason.UNKNOWN_VCPU, (), "1 to 2 vCPUs"),
    ("count True", lambda: with_count(domain_of_rows("0-"), count=True), DenialReason.UNKNOWN_VCPU, (), "count true"),
    ("maximum 0", lambda: with_max(domain_of_rows("0-"), 0), DenialReason.UNKNOWN_VCPU, (), "1 to 16384"),
    ("maximum -1", lambda: with_max(domain_of_rows("0-"), -1), DenialReason.UNKNOWN_VCPU, (), "1 to 16384"),
    ("maximum 2^32", lambda: with_max(domain_of_rows("0-"), 2**32), DenialReason.UNKNOWN_VCPU, (), "1 to 16384"),
    ("topology", lambda: with_max(CORES, 24), DenialReason.TOPOLOGY_MISMATCH, (), "<topology> has 16 vCPUs"),
    (
        "new topology",
        lambda: with_max(replace(CORES, topology=Topology(24, 3, threads=8)), 32),
        DenialReason.TOPOLOGY_MISMATCH,
        (),
        "<topology> has 24 vCPUs",
    ),
    ("numa", lambda: with_max(NUMA, 2), DenialReason.NUMA_MISMATCH, (2, 3), "NUMA cell 0 has vCPUs 2-3"),
    (
        "half",
        lambda: with_state(CORES, [8], enabled=True),
        DenialReason.PART_OF_SLOT,
        tuple(range(8, 16)),
        "9-15 not",
    ),
    ("not first", lambda: slot_of(CORES, 9), DenialReason.PART_OF_SLOT, tuple(range(8, 16)), "name it by vCPU 8"),
    ("count 12", lambda: with_count(CORES, 12), DenialReason.COUNT_SPLITS_SLOT, (), "8 and 16 are possible"),
]


@pytest.mark.parametrize(("what", "change", "reason", "ids", "words"), DENIED, ids=[row[0] for row in DENIED])
def test_what_cannot_be_is_denied_with_its_reason(
    what: str, change: Callable[[], object], reason: DenialReason, ids: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ConfigDeniedError) as caught:
        change()
    assert caught.value.reason is reason, what
    assert tuple(caught.value.ids) == ids
    assert words in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert caught.value.outcome is Outcome.UNCHANGED


def test_what_is_no_vcpu_id_is_no_map() -> None:
    with pytest.raises(InvalidMapError):
        with_map(domain_of_rows("0-"), [0, -1])


def test_where_a_core_is_a_slot_its_threads_move_together() -> None:
    assert slot_of(CORES, 8) == set(range(8, 16))
    changed = with_count(CORES, 16)
    assert said(changed) == "0" * 16
    ordered = replace(CORES, vcpus=tuple(DomainVcpu(row.id, row.enabled, row.hotpluggable, 1) for row in CORES.vcpus))
    ordered = with_state(ordered, range(8, 16), enabled=True)
    assert {row.order for row in ordered.vcpus[8:]} == {2}
    assert broken(ordered) == []


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("map"), st.frozensets(st.integers(0, 9))),
        st.tuples(st.just("count"), st.integers(0, 10), st.booleans()),
        st.tuples(st.just("state"), st.frozensets(st.integers(0, 9), min_size=1), st.booleans()),
        st.tuples(st.just("max"), st.integers(0, 10)),
    ),
    min_size=1,
    max_size=6,
)


def change(domain: DomainVcpus, step: tuple[object, ...]) -> tuple[DomainVcpus, set[int] | None, int | None]:
    """Return what *step* makes of *domain*, and what is to be enabled then: which, or how many."""
    match step:
        case ("map", frozenset() as wish):
            return with_map(domain, wish), set(wish), None
        case ("count", int(number), bool(hotpluggable)):
            return with_count(domain, number, hotpluggable=hotpluggable), None, number
        case ("state", frozenset() as ids, bool(enabled)):
            wished = domain.enabled | ids if enabled else domain.enabled - ids
            return with_state(domain, ids, enabled=enabled), set(wished), None
        case ("max", int(number)):
            return with_max(domain, number), {each for each in domain.enabled if each < number}, None
    raise AssertionError(step)


@given(domain=domains(), steps=STEPS)
def test_whatever_is_changed_libvirt_takes_it_and_starts_what_was_wished(
    domain: DomainVcpus, steps: list[tuple[object, ...]]
) -> None:
    assert broken(domain) == []
    for step in steps:
        before = domain
        try:
            domain, wished, number = change(domain, step)
        except ConfigDeniedError:
            continue
        assert broken(domain) == []
        read = parse(document(domain))
        assert (read.vcpus, read.numa) == (domain.vcpus, domain.numa)
        assert wished is None or set(started(domain)) == wished
        assert number is None or len(started(domain)) == number
        stayed = [each for each in started(before) if each in domain.enabled and each not in domain.started_with]
        kept = [each for each in domain.order if each in stayed]
        assert kept == [each for each in stayed if each in kept]
        assert change(domain, step)[0] == domain
