"""What was intended comes back exactly as it was meant, or not at all."""

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from qmpvcpu.domainxml import NAMESPACE, Instance, Metadata, read_identity, render
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.placement import CoreScheduling, Place, Placement, Scheduler
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from tests.domainxml.examples import layout_of
from tests.model.values import paths

LAYOUT = layout_of(4, [0, 2], boot=1)
INTENT = Intent(
    VcpuMap([0, 1, 6]),
    VcpuMap([0, 2, 3, 4, 5]),
    (
        Step(Action.PLUG, VcpuMap([2, 3])),
        Step(Action.UNPLUG, VcpuMap([6]), "/machine/peripheral/vcpu6", joins=True),
        Step(Action.UNPLUG, VcpuMap([7]), "/machine/peripheral/vcpu7", asks_agent=True),
        Step(Action.KEEP, VcpuMap([1]), "/machine/unattached/device[1]"),
    ),
    OnFailure.REVERT,
    12.5,
    Direction.REVERTING,
)


def read_back(metadata: Metadata) -> Metadata | None:
    found = read_identity(render(LAYOUT, metadata=metadata))
    assert found.foreign == ()
    return found.metadata


maps = st.builds(VcpuMap, st.sets(st.integers(0, 16383) | st.integers(0, 9), max_size=20))
steps = st.builds(
    Step,
    st.sampled_from(Action),
    maps.filter(bool),
    st.none() | paths,
    joins=st.booleans(),
    asks_agent=st.booleans(),
)
host_cpus = maps.filter(bool)
places = st.builds(
    Place,
    st.none() | host_cpus,
    st.none() | st.sampled_from(["other", "batch", "idle", "fifo:1", "rr:99"]).map(Scheduler.parse),
)
placements = st.builds(
    Placement, st.dictionaries(st.integers(0, 16383), places.filter(bool), max_size=4), places, st.none() | host_cpus
)
intents = st.builds(
    Intent,
    maps,
    maps,
    st.lists(steps, max_size=8).map(tuple),
    st.sampled_from(OnFailure),
    st.floats(min_value=0, allow_nan=False, allow_infinity=False) | st.integers(0, 10**6),
    st.sampled_from(Direction),
    st.none() | maps.map(lambda ids: VcpuMap([0, *ids])),
    st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    main_cpus=st.none() | host_cpus,
    birthplaces=st.lists(host_cpus, max_size=3).map(tuple),
    next_placement=st.none() | placements,
)


@given(st.none() | intents, st.none() | maps, st.none() | maps, st.none() | placements)
def test_any_intent_and_any_wish_come_back_as_they_were(
    intent: Intent | None, desired: VcpuMap | None, next_boot: VcpuMap | None, placement: Placement | None
) -> None:
    next_boot = None if next_boot is None else VcpuMap([0, *next_boot])
    metadata = Metadata(1, intent=intent, desired=desired, next_boot=next_boot, next_placement=placement)
    assert read_back(metadata) == metadata


@st.composite
def previous(draw: st.DrawFn) -> PreviousVcpus:
    order = tuple(draw(st.lists(st.integers(0, 16383), min_size=1, max_size=9, unique=True)))
    levels = draw(st.none() | st.lists(st.integers(1, 9), min_size=8, max_size=8))
    topology = None if levels is None else Topology(prod(levels), *levels)
    return PreviousVcpus(16384, VcpuMap(order[: draw(st.integers(1, len(order)))]), order, topology)


@given(kept=previous(), nameless=st.booleans(), kind=st.none() | st.sampled_from(CoreScheduling))
def test_what_an_earlier_qemu_had_comes_back_as_it_was(
    *, kept: PreviousVcpus, nameless: bool, kind: CoreScheduling | None
) -> None:
    metadata = Metadata(previous=kept, nameless=nameless, core_scheduling=kind)
    assert read_back(metadata) == metadata


@given(intents, maps)
def test_what_is_written_is_the_same_each_time(intent: Intent, desired: VcpuMap) -> None:
    document = render(LAYOUT, metadata=Metadata(intent=intent, desired=desired))
    found = read_identity(document).metadata
    assert found is not None
    assert render(LAYOUT, metadata=found) == document


def test_a_transition_reads_as_a_person_would_write_it() -> None:
    metadata = Metadata(
        generation=7, instance=Instance(4711, 42), pending=VcpuMap([6]), intent=INTENT, desired=VcpuMap([0, 2])
    )
    document = render(LAYOUT, metadata=metadata).decode()
    assert (
        """  <metadata>
    <qmpvcpu:record xmlns:qmpvcpu="urn:qmpvcpu:record:1" generation="7">
      <qmpvcpu:instance host-tid="4711" start-ticks="42"/>
      <qmpvcpu:pending vcpus="6"/>
      <qmpvcpu:desired vcpus="0,2"/>
      <qmpvcpu:transition start="0-1,6" target="0,2-5" on-failure="revert" timeout="12.5" direction="reverting">
        <qmpvcpu:step action="plug" vcpus="2-3"/>
        <qmpvcpu:step action="unplug" vcpus="6" path="/machine/peripheral/vcpu6" joins="yes"/>
        <qmpvcpu:step action="unplug" vcpus="7" path="/machine/peripheral/vcpu7" asks-agent="yes"/>
        <qmpvcpu:step action="keep" vcpus="1" path="/machine/unattached/device[1]"/>
      </qmpvcpu:transition>
    </qmpvcpu:record>
    <qmpvcpu:cpu xmlns:qmpvcpu="urn:qmpvcpu:cpu:1" model="qemu64" features="unknown"/>
  </metadata>
"""
        in document
    )


def test_the_next_boot_reads_as_a_person_would_write_it() -> None:
    intent = Intent(VcpuMap([0]), VcpuMap([0, 2]), (), next_boot=VcpuMap([0, 2]), config="/etc/vm.xml")
    text = render(LAYOUT, metadata=Metadata(intent=intent, next_boot=VcpuMap([0, 1]))).decode()
    assert '<qmpvcpu:next-boot vcpus="0-1"/>' in text
    assert 'direction="forward" next-boot="0,2" config="/etc/vm.xml"/>' in text


def test_the_places_of_the_next_boot_read_as_a_person_would_write_them() -> None:
    cores = dict.fromkeys([2, 3], Place.on("8-11", "fifo:1"))
    placement = Placement({1: Place.on("1"), **cores}, Place.on("0"), VcpuMap(range(8)))
    intent = Intent(
        VcpuMap([0]), VcpuMap([0]), (), next_placement=Placement(emulator=Place(scheduler=Scheduler.parse("idle")))
    )
    text = render(LAYOUT, metadata=Metadata(intent=intent, next_placement=placement)).decode()
    assert (
        """      <qmpvcpu:next-placement cpuset="0-7">
        <qmpvcpu:place vcpus="1" cpuset="1"/>
        <qmpvcpu:place vcpus="2-3" cpuset="8-11" scheduler="fifo:1"/>
        <qmpvcpu:emulator cpuset="0"/>
      </qmpvcpu:next-placement>
      <qmpvcpu:transition start="0" target="0" on-failure="stop" timeout="30.0" direction="forward">
        <qmpvcpu:next-placement>
          <qmpvcpu:emulator scheduler="idle"/>
        </qmpvcpu:next-placement>
      </qmpvcpu:transition>
"""
        in text
    )


def test_a_wish_for_no_place_is_not_the_absence_of_a_wish() -> None:
    assert read_back(Metadata(next_placement=Placement())) == Metadata(next_placement=Placement())


def test_a_wish_for_nothing_is_not_the_absence_of_a_wish() -> None:
    assert read_back(Metadata(desired=VcpuMap())) == Metadata(desired=VcpuMap())
    assert read_back(Metadata()) == Metadata()


@pytest.mark.parametrize(
    ("intent", "told"),
    [
        (replace(INTENT, timeout=float("nan")), "nan is not a time"),
        (replace(INTENT, timeout=-1.0), "-1.0 is not a time"),
        (replace(INTENT, steps=(Step(Action.PLUG, VcpuMap()),)), "a step without a vCPU"),
        (replace(INTENT, steps=(Step(Action.UNPLUG, VcpuMap([1]), "/a\nb"),)), "cannot"),
    ],
)
def test_an_intent_that_could_not_be_read_back_is_not_written(intent: Intent, told: str) -> None:
    with pytest.raises(DomainXmlError, match=told):
        render(LAYOUT, metadata=Metadata(intent=intent))


STEP = "<q:step action='plug' vcpus='2'/>"
JOINING = "<q:step action='unplug' vcpus='2' joins='1'/>"
WHOLE = "start='0' target='0,2' on-failure='stop' timeout='30.0' direction='forward'"


def _next(inside: str) -> str:
    return f"<q:next-placement>{inside}</q:next-placement>"


DAMAGED = {
    "generation is missing": ("", "<record>: generation is missing"),
    "generation below none": ("generation='-1'", "<record>: generation: '-1' is not a number"),
    "a number in other digits": ("generation='\u0661'", "is not a number"),
    "a number without end": (f"generation='{'9' * 5000}'", "is not a number"),
    "no uuid": ("generation='1' made-up-uuid='x'", "<record>: made-up-uuid"),
    "an instance of no thread": ("<q:instance/>", "<instance>: host-tid is missing"),
    "an instance without a time": ("<q:instance host-tid='1' start-ticks='x'/>", "<instance>: start-ticks"),
    "pending half of a range": ("<q:pending vcpus='1-'/>", "<pending>: vcpus: '' is not a number"),
    "pending of nothing": ("<q:pending/>", "<pending>: vcpus is missing"),
    "two pendings": ("<q:pending vcpus='1'/><q:pending vcpus='2'/>", "<pending>: there are two of it"),
    "a device of no vCPU": ("<q:device id='a'/>", "<device>: vcpu is missing"),
    "a device without id": ("<q:device vcpu='1'/>", "<device>: id is missing"),
    "an earlier QEMU of no size": ("<q:previous started-with='1' order='0'/>", "<previous>: max is missing"),
    "one without a vCPU": ("<q:previous max='4' started-with='1' order=''/>", "<previous>: order"),
    "one with a vCPU twice": ("<q:previous max='4' started-with='1' order='0,1,1'/>", "each once"),
    "one with a vCPU too many": ("<q:previous max='4' started-with='1' order='0,4'/>", "of 4 vCPUs"),
    "one that starts with more": ("<q:previous max='4' started-with='2' order='0'/>", "not 2 or more"),
    "one without end": ("<q:previous max='99999' started-with='1' order='0'/>", "is not 1 to 16384"),
    "one with no such level": ("<q:previous max='4' started-with='1' order='0' cores='0'/>", "<previous>: cores"),
    "neither nameless nor not": ("generation='1' nameless='1'", "<record>: nameless"),
    "cores that are shared in no known way": ("generation='1' core-scheduling='x'", "<record>: core-scheduling: 'x'"),
    "two devices in one slot": ("<q:device vcpu='1' id='a'/><q:device vcpu='1' id='b'/>", "another of vCPU 1"),
    "a device with an option": ("<q:device vcpu='1' id='a,b=c'/>", "<device>: id: 'a,b=c' is not a device id"),
    "a step to nowhere": (
        f"<q:transition {WHOLE}><q:step action='unplug' vcpus='2' path='vcpu2'/></q:transition>",
        "<step>: path: 'vcpu2' is not a QOM path",
    ),
    "a next boot without a map": ("<q:next-boot/>", "<next-boot>: vcpus is missing"),
    "a next boot without vCPU 0": ("<q:next-boot vcpus='1-2'/>", "<next-boot>: vcpus: '1-2' lacks vCPU 0"),
    "a placement on no host CPU": ("<q:next-placement cpuset=''/>", "<next-placement>: cpuset: '' names no host CPU"),
    "two placements": ("<q:next-placement/><q:next-placement/>", "<next-placement>: there are two of it"),
    "a place of no vCPU": (_next("<q:place cpuset='1'/>"), "<place>: vcpus is missing"),
    "a place on no host CPU": (_next("<q:place vcpus='1' cpuset=''/>"), "<place>: cpuset: '' names no host CPU"),
    "a place beyond all host CPUs": (_next("<q:place vcpus='1' cpuset='16384'/>"), "<place>: cpuset: .* 0 to 16383"),
    "a place with a wrong scheduler": (
        _next("<q:place vcpus='1' scheduler='fair'/>"),
        "<place>: scheduler: .fair. is no",
    ),
    "a place with a priority too high": (_next("<q:place vcpus='1' scheduler='rr:100'/>"), "scheduler: .* not 100"),
    "two places for one vCPU": (_next("<q:place vcpus='0-2'/><q:place vcpus='2'/>"), "another of vCPU 2"),
    "two places for the emulator": (_next("<q:emulator/><q:emulator/>"), "<emulator>: there are two of it"),
    "a place of somebody": (_next("<o:x xmlns:o='urn:o'/>"), "<next-placement>: <{urn:o}x> is not ours"),
    "a wish without a map": ("<q:desired/>", "<desired>: vcpus is missing"),
    "a wish beyond all vCPUs": ("<q:desired vcpus='0-16384'/>", "<desired>: vcpus: .* 0 to 16383"),
    "a wish that excludes": ("<q:desired vcpus='0-3,^2'/>", "<desired>: vcpus: '\\^2' is not a number"),
    "a wish that runs downwards": ("<q:desired vcpus='3-1'/>", "<desired>: vcpus: '3-1' does not ascend"),
    "a wish that says a vCPU twice": ("<q:desired vcpus='0-3,3'/>", "does not ascend"),
    "a transition without a start": (f"<q:transition {WHOLE[10:]}/>", "<transition>: start is missing"),
    "a transition without a policy": (f"<q:transition {WHOLE.replace('stop', 'pray')}/>", "on-failure: 'pray'"),
    "a transition to somewhere": (f"<q:transition {WHOLE.replace('forward', 'up')}/>", "direction: 'up'"),
    "a wait for a while": (f"<q:transition {WHOLE.replace('30.0', 'long')}/>", "timeout: 'long' is not a time"),
    "a wait for nan": (f"<q:transition {WHOLE.replace('30.0', 'nan')}/>", "timeout: 'nan' is not a time"),
    "a wait for ever": (f"<q:transition {WHOLE.replace('30.0', 'inf')}/>", "timeout: 'inf' is not a time"),
    "a wait without end": (f"<q:transition {WHOLE.replace('30.0', '9e+999')}/>", "timeout: '9e.999' is not a time"),
    "a wait before it began": (f"<q:transition {WHOLE.replace('30.0', '-1.0')}/>", "timeout: '-1.0' is not a time"),
    "an element of nobody": ("<pins/>", "<record>: <pins> is not ours"),
    "an element of somebody": ("<o:x xmlns:o='urn:o'/>", "<record>: <{urn:o}x> is not ours"),
    "an attribute of somebody": ("generation='1' o:x='1' xmlns:o='urn:o'", "<record>: {urn:o}x is not ours"),
    "an element of somebody further down": (
        f"<q:transition {WHOLE}><o:x xmlns:o='urn:o'/></q:transition>",
        "<transition>: <{urn:o}x> is not ours",
    ),
    "a birthplace nowhere": (f"<q:transition {WHOLE} birthplaces='1;;3'/>", "birthplaces: '' names no host CPU"),
    "birthplaces without end": (
        f"<q:transition {WHOLE} birthplaces='{';'.join(['0-16383'] * 65)}'/>",
        "names more host CPUs than any placement",
    ),
    "a home nowhere": (f"<q:transition {WHOLE} main-cpus=''/>", "main-cpus: '' names no host CPU"),
    "two transitions": (f"<q:transition {WHOLE}/><q:transition {WHOLE}/>", "<transition>: there are two of it"),
    "a step of nothing": (f"<q:transition {WHOLE}><q:step/></q:transition>", "<step>: action is missing"),
    "a step of no action": (f"<q:transition {WHOLE}>{STEP.replace('plug', 'sing')}</q:transition>", "action: 'sing'"),
    "a step of no slot": (f"<q:transition {WHOLE}>{STEP.replace('2', '')}</q:transition>", "a slot has a vCPU"),
    "a step that may join": (
        f"<q:transition {WHOLE}>{JOINING}</q:transition>",
        "joins: '1' is neither yes nor no",
    ),
    "a step that may ask": (
        f"<q:transition {WHOLE}>{JOINING.replace('joins', 'asks-agent')}</q:transition>",
        "asks-agent: '1' is neither yes nor no",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_told_with_its_place_and_not_guessed_around(case: str) -> None:
    damage, told = DAMAGED[case]
    attributes, children = ("generation='1'", damage) if damage.startswith("<") else (damage, "")
    record = f"<q:record xmlns:q='{NAMESPACE}' {attributes}>\n{children}</q:record>"
    line = 3 if children and told[1:7] != "record" else 2
    document = f"<domain><name>a</name>\n<metadata>{record}</metadata></domain>"
    with pytest.raises(DomainXmlError, match=f"line {line}: our metadata is damaged: .*{told}") as refused:
        read_identity(document.encode())
    assert refused.value.line == line
    assert len(str(refused.value)) < 400


def test_our_element_is_there_once() -> None:
    record = f"<q:record xmlns:q='{NAMESPACE}' generation='1'/>"
    with pytest.raises(DomainXmlError, match="there are two of it"):
        read_identity(f"<domain><name>a</name><metadata>{record}{record}</metadata></domain>".encode())
    found = read_identity(
        f"<domain><name>a</name><metadata>{record}</metadata><metadata>{record}</metadata></domain>".encode()
    )
    assert found.foreign == (f"{{{NAMESPACE}}}record",)


def test_maps_that_would_unfold_without_end_are_refused_at_once() -> None:
    transition = f"<q:transition {WHOLE}>{STEP.replace('2', '0-16383') * 50_000}</q:transition>"
    again = f"<q:desired vcpus='{','.join(['0-16383'] * 200_000)}'/>"
    everywhere = _next("".join(f"<q:place vcpus='{each}' cpuset='0-16383'/>" for each in range(16_000)))
    for inside, told in (
        (transition, "more vCPUs than any machine has"),
        (again, "does not ascend"),
        (everywhere, "more host CPUs than any document names"),
    ):
        record = f"<q:record xmlns:q='{NAMESPACE}' generation='1'>{inside}</q:record>"
        with pytest.raises(DomainXmlError, match=told):
            read_identity(f"<domain><name>a</name><metadata>{record}</metadata></domain>".encode())


@given(st.data())
def test_whatever_one_attribute_becomes_the_record_is_read_or_refused_and_what_is_read_is_whole(
    data: st.DataObject,
) -> None:
    placement = Placement({2: Place.on("8", "rr:3")}, Place.on("0"), VcpuMap([1]))
    metadata = Metadata(3, instance=Instance(7, 8), intent=INTENT, desired=VcpuMap([0, 2]), next_placement=placement)
    root = etree.fromstring(render(LAYOUT, metadata=metadata))
    ours = [each for each in root.iter(f"{{{NAMESPACE}}}*") if each.items()]
    element = data.draw(st.sampled_from(ours), label="element")
    name = data.draw(st.sampled_from([str(name) for name, _ in element.items()]), label="attribute")
    element.set(name, data.draw(st.sampled_from(["", "0", "7", "yes", "no", "plug", "inf", "0-3", "-", "x"])))
    try:
        found = read_identity(etree.tostring(root)).metadata
    except DomainXmlError as error:
        assert "our metadata is damaged" in str(error)  # noqa: PT017 -- both ends are right
    else:
        assert found is not None
        assert read_back(found) == found
