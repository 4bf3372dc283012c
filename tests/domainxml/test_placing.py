"""The host CPUs and schedulers of a document are a placement, by libvirt's rules of which wins, and the way back."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.domainxml import ThreadSched, parse, placement_of, update, validate, with_placement
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.placement import CoreScheduling, Place, Placement, PlacementPolicy, SchedPolicy, Scheduler
from qmpvcpu.model.vcpumap import VcpuMap
from tests.domainxml.documents import SAMPLES, VCPU, document, inserted, outside

RR_3 = Scheduler(SchedPolicy.RR, 3)


def tuned(*inside: str, vcpu: str = VCPU) -> bytes:
    return document(vcpu, "  <cputune>", *(f"    {each}" for each in inside), "  </cputune>")


def test_all_that_a_document_says_of_threads_is_in_its_placement() -> None:
    placement = placement_of(parse(SAMPLES["cputune-schedulers"]))
    assert placement == Placement(
        {
            0: Place(scheduler=Scheduler(SchedPolicy.BATCH)),
            1: Place.on("1", "fifo:99"),
            2: Place.on("0", "fifo:1"),
            4: Place(scheduler=Scheduler(SchedPolicy.IDLE)),
        },
        Place.on("0", RR_3),
        VcpuMap([0, 1]),
        everywhere=True,
    )


def test_a_pin_wins_over_the_cpuset_which_wins_over_all_host_cpus() -> None:
    vcpu = "  <vcpu cpuset='0-3'>4</vcpu>"
    placement = placement_of(parse(tuned("<vcpupin vcpu='1' cpuset='8-11'/>", vcpu=vcpu)))
    assert placement.of_vcpu(1).cpus == {8, 9, 10, 11}
    assert placement.of_vcpu(0).cpus == {0, 1, 2, 3}
    assert placement.of_emulator().cpus == {0, 1, 2, 3}
    pinned = placement_of(parse(tuned("<emulatorpin cpuset='9'/>", vcpu=vcpu)))
    assert pinned.of_emulator().cpus == {9}
    assert pinned.of_vcpu(0).cpus == {0, 1, 2, 3}
    alone = placement_of(parse(tuned("<vcpupin vcpu='1' cpuset='8-11'/>")))
    assert (alone.of_vcpu(0).cpus, alone.of_emulator().cpus, alone.everywhere) == (None, None, True)


def test_a_document_that_says_nothing_of_threads_places_none() -> None:
    placement = placement_of(parse(document(VCPU, "  <cputune><shares>2048</shares></cputune>")))
    assert not placement
    assert not placement.everywhere


def test_pins_of_vcpus_that_are_off_count_and_those_of_impossible_ones_do_not() -> None:
    pins = ("<vcpupin vcpu='3' cpuset='1'/>", "<vcpupin vcpu='4' cpuset='1'/>", "<vcpupin vcpu='900' cpuset='1'/>")
    assert set(placement_of(parse(tuned(*pins))).vcpus) == {3}


@pytest.mark.parametrize("case", ["placement-auto", "placement-derived", "schedulers-of-several"])
def test_what_numad_would_say_is_unknown_and_the_document_tells_so(case: str) -> None:
    domain = parse(SAMPLES[case])
    placement = placement_of(domain)
    assert domain.placement == "auto"
    assert not placement.everywhere
    unpinned = next(each.id for each in domain.vcpus if each.id not in domain.pins)
    assert placement.of_vcpu(unpinned).cpus is None
    assert all(placement.of_vcpu(vcpu).cpus == pin for vcpu, pin in domain.pins.items())


@pytest.mark.parametrize("tag", ["vcpusched vcpus='2'", "emulatorsched"])
def test_a_priority_that_no_kernel_has_is_named(tag: str) -> None:
    domain = parse(tuned(f"<{tag} scheduler='fifo' priority='100'/>"))
    with pytest.raises(DomainXmlError, match=rf"<{tag[:9]}.*>.*a priority is 1 to 99 .*, not 100; libvirt"):
        placement_of(domain)


def test_a_priority_is_a_rule_of_the_start_for_the_vcpus_that_are_on() -> None:
    def rules(vcpus: str) -> list[tuple[str | None, int | None]]:
        xml = tuned(f"<vcpusched vcpus='{vcpus}' scheduler='fifo' priority='100'/>")
        return [(each.element, each.line) for each in validate(xml)]

    assert rules("0-1") == [("cputune/vcpusched", 5)]
    assert rules("2-3") == []
    both = tuned("<emulatorsched scheduler='rr' priority='0'/>", "<vcpusched vcpus='0' scheduler='rr' priority='0'/>")
    assert [each.element for each in validate(both)] == ["cputune/emulatorsched", "cputune/vcpusched"]


# The way back.


@pytest.mark.parametrize("case", SAMPLES)
def test_the_placement_of_a_document_put_back_leaves_it_as_it_is(case: str) -> None:
    base = SAMPLES[case]
    domain = parse(base)
    same = with_placement(domain, placement_of(domain))
    assert same == domain
    assert update(base, same) == base


HOST_CPUS = st.sets(st.integers(0, 600), min_size=1, max_size=4).map(VcpuMap)
SCHEDULERS = st.sampled_from(["batch", "idle", "fifo:1", "rr:99", "rr:3"]).map(Scheduler.parse)
PLACES = st.builds(Place, st.none() | HOST_CPUS, st.none() | SCHEDULERS)
# Of one vCPU, so that each sample has it; a place that says nothing is no place in a document.
PLACEMENTS = st.builds(
    Placement, st.dictionaries(st.just(0), PLACES.filter(bool), max_size=1), PLACES, st.none() | HOST_CPUS
)


@pytest.mark.parametrize("case", SAMPLES)
@given(placement=PLACEMENTS)
def test_any_placement_is_said_and_read_back_and_nothing_else_changes(case: str, placement: Placement) -> None:
    base = SAMPLES[case]
    domain = parse(base)
    result = update(base, with_placement(domain, placement))
    again = parse(result)
    assert placement_of(again) == replace(placement, everywhere=bool(placement) and again.placement == "static")
    assert validate(result) == ()
    assert replace(with_placement(again, placement_of(domain)), placement=domain.placement) == domain
    assert outside(result) == outside(base)


def test_new_elements_stand_where_libvirt_prints_them_and_each_vcpu_has_its_own() -> None:
    base = document(VCPU, "  <os/>")
    places = dict.fromkeys([0, 1, 3], Place.on("0-1", "rr:3"))
    placement = Placement(places, Place.on("2", "batch"), cpuset=VcpuMap([4]))
    result = update(base, with_placement(parse(base), placement)).decode()
    assert "<vcpu placement='static' cpuset='4' current='2'>4</vcpu>\n  <cputune>" in result
    assert inserted(base.replace(b" current", b" cpuset='4' current"), result) == [
        "  <cputune>",
        "    <vcpupin vcpu='0' cpuset='0-1'/>",
        "    <vcpupin vcpu='1' cpuset='0-1'/>",
        "    <vcpupin vcpu='3' cpuset='0-1'/>",
        "    <emulatorpin cpuset='2'/>",
        "    <emulatorsched scheduler='batch'/>",
        "    <vcpusched vcpus='0' scheduler='rr' priority='3'/>",
        "    <vcpusched vcpus='1' scheduler='rr' priority='3'/>",
        "    <vcpusched vcpus='3' scheduler='rr' priority='3'/>",
        "  </cputune>",
    ]


def test_a_scheduler_of_one_more_vcpu_stands_in_the_order_of_the_vcpus() -> None:
    base = tuned("<vcpusched vcpus='0' scheduler='idle'/>", "<vcpusched vcpus='2-3' scheduler='idle'/>")
    domain = parse(base)
    result = update(base, replace(domain, scheds={**domain.scheds, 1: ThreadSched("batch")})).decode()
    assert inserted(base, result) == ["    <vcpusched vcpus='1' scheduler='batch'/>"]
    assert result.index("'1' scheduler") < result.index("'2-3' scheduler")


def test_the_emulators_scheduler_comes_changes_and_goes() -> None:
    base = tuned("<vcpusched vcpus='0' scheduler='idle'/>")
    domain = parse(base)
    first = update(base, replace(domain, emulator_sched=ThreadSched("fifo", 7)))
    line = "    <emulatorsched scheduler='fifo' priority='7'/>\n"
    assert first.decode() == base.decode().replace("    <vcpusched", f"{line}    <vcpusched")
    second = update(first, replace(domain, emulator_sched=ThreadSched("batch")))
    assert second == first.replace(b"'fifo' priority='7'", b"'batch'")
    assert update(second, replace(domain, emulator_sched=ThreadSched("fifo", 7))) == first
    assert update(first, domain) == base


def test_a_cpuset_ends_the_automatic_placement_under_which_libvirt_would_not_read_it() -> None:
    domain = parse(SAMPLES["placement-auto"])
    assert with_placement(domain, Placement.pinned({0: "1"})).placement == "auto"
    static = with_placement(domain, Placement(cpuset=VcpuMap([1])))
    assert static.placement == "static"
    assert static.cpuset == {1}


def test_what_libvirt_has_no_word_for_is_left_out() -> None:
    domain = parse(document(VCPU))
    unsaid = Placement(
        {0: Place(scheduler=Scheduler(SchedPolicy.OTHER)), 4: Place.on("0")},
        Place(scheduler=Scheduler(SchedPolicy.OTHER)),
        core_scheduling=CoreScheduling.VCPUS,
        exclusive=True,
        policy=PlacementPolicy.PREFERRED,
    )
    assert with_placement(domain, unsaid) == domain
