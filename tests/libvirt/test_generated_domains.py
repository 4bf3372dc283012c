"""libvirt as the oracle: of hundreds of domains it takes what we take, refuses what we refuse, reads what we read.

What is compared, for each generated document:

* at define (without its schema, which is another matter): libvirt takes it if and only if no rule of stage DEFINE is
  broken; if it refuses it, then with the words of the first rule that we find broken;
* what ``virsh dumpxml --inactive`` prints of it reads as the document itself does, save for what is ``READING``;
* for some, at start: libvirt starts it if and only if no rule of stage START is broken, and the vCPUs are then
  plugged in the order that ``parse`` tells.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings

from qmpvcpu.domainxml import parse, validate
from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
from qmpvcpu.errors import DomainRuleError, DomainXmlError
from tests.domainxml.broken import BROKEN, PARTS
from tests.domainxml.broken import document as broken_document
from tests.figures import COMPARED
from tests.libvirt.console import Console, open_console
from tests.libvirt.daemon import Libvirt, VirshError
from tests.libvirt.domains import NAME, Machine, any_document, documents_with_three_vcpus
from tests.substrates import qemus

pytestmark = pytest.mark.libvirt

QEMUS = qemus()
LIMITS = {"pc-i440fx-7.2": 255, "pc-q35-7.2": 288, "pc-i440fx-10.0": 255, "pc-q35-10.0": 4096}
MACHINES = [
    Machine(name, str(path), LIMITS[name])
    for version, path in QEMUS.items()
    for name in (f"pc-i440fx-{version}", f"pc-q35-{version}")
    if name in LIMITS
]
MOST_DEFINED = 400
MOST_STARTED = 15
MOST_REFUSED_AT_START = 8
REFUSED_AFTER_READING = {
    DomainRule.ORDER_TWICE,
    DomainRule.ORDER_ABOVE_MAX,
    DomainRule.PASSTHROUGH_WITHOUT_KVM,
    DomainRule.PRIORITY_OUT_OF_RANGE,
}
REFUSED_AT_START = {
    DomainRule.STARTED_WITH_AFTER_HOTPLUGGABLE,
    DomainRule.STARTED_WITH_DESCENDING,
    DomainRule.ORDER_TWICE,
    DomainRule.ORDER_ABOVE_MAX,
}


@dataclass
class Tally:
    """What the run came to."""

    seen: set[bytes] = field(default_factory=set)
    taken: int = 0
    refused: int = 0
    rules: set[DomainRule] = field(default_factory=set)
    differences: int = 0


@contextlib.contextmanager
def counted(record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """Count, and tell the count however the comparison ends."""
    tally = Tally()
    try:
        yield tally
    finally:
        record_property(COMPARED, (tally.taken, tally.refused, tally.differences))


@pytest.fixture
def console(libvirt: Libvirt) -> Iterator[Console]:
    with open_console(libvirt) as opened:
        yield opened


def first_of(xml: bytes, stage: RuleStage) -> DomainRuleError | None:
    return next((error for error in validate(xml) if error.stage is stage), None)


def compare_definition(console: Console, xml: bytes, tally: Tally) -> None:
    """Assert that libvirt and we say the same of a document."""
    expected = first_of(xml, RuleStage.DEFINE)
    told = console.refusal(xml)
    if expected is None:
        assert not told, f"libvirt refuses what we take: {told}"
        compare_printed(console.ask(f"dumpxml --inactive {NAME}").encode(), xml)
        tally.taken += 1
        return
    assert told, f"libvirt takes what we refuse: {expected}"
    if expected.rule is not DomainRule.COUNT_ZERO:  # READING: "no vCPUs"
        assert expected.libvirt_says in told, f"libvirt refuses it for another reason than we do: {expected}\n{told}"
    tally.rules.add(expected.rule)
    tally.refused += 1


def compare_printed(printed: bytes, xml: bytes) -> None:
    """Assert that libvirt's own document reads as the one that it was given."""
    doomed = first_of(xml, RuleStage.START)
    if doomed is not None and doomed.rule not in REFUSED_AFTER_READING:
        # What libvirt fills in breaks a rule that it has checked before: it prints what it would not take again.
        with pytest.raises(DomainRuleError) as again:
            parse(printed)
        assert again.value.rule is doomed.rule
        return
    given_domain, printed_domain = parse(xml), parse(printed)
    if given_domain.cpu is None:  # READING: "cpu"
        printed_domain = replace(printed_domain, cpu=None)
    assert printed_domain == given_domain


def test_libvirt_takes_refuses_and_reads_what_we_do(
    console: Console, record_property: Callable[[str, object], None]
) -> None:
    with counted(record_property) as tally:

        @settings(max_examples=MOST_DEFINED, deadline=None, suppress_health_check=list(HealthCheck))
        @given(xml=any_document(MACHINES))
        def compare(xml: bytes) -> None:
            if xml in tally.seen:
                return
            tally.seen.add(xml)
            try:
                compare_definition(console, xml, tally)
            except AssertionError:
                tally.differences += 1
                tally.seen.discard(xml)
                raise

        compare()
        assert tally.taken >= 60
        assert tally.refused >= 60
        assert tally.taken + tally.refused >= 200


def sample_to_start() -> list[bytes]:
    """Return some of the documents that libvirt defines: as many for each outcome of a start."""
    outcomes: dict[DomainRule | None, list[bytes]] = {}
    for xml in documents_with_three_vcpus(MACHINES):
        errors = validate(xml)
        if not errors or errors[0].stage is RuleStage.START:
            outcomes.setdefault(errors[0].rule if errors else None, []).append(xml)
    assert len(outcomes) == len(REFUSED_AT_START) + 1
    return [
        xml
        for rule, group in outcomes.items()
        for xml in group[:: len(group) // (MOST_STARTED if rule is None else MOST_REFUSED_AT_START) + 1]
    ]


def test_libvirt_starts_what_we_say_that_it_starts(
    console: Console, record_property: Callable[[str, object], None]
) -> None:
    with counted(record_property) as tally:
        for xml in sample_to_start():
            try:
                compare_start(console, xml, tally)
            except AssertionError:
                tally.differences += 1
                raise
        assert tally.rules == REFUSED_AT_START
        assert tally.taken + tally.refused >= 30


def compare_start(console: Console, xml: bytes, tally: Tally) -> None:
    """Assert that libvirt starts it as we say, or refuses to as we say."""
    assert not console.refusal(xml)
    expected = first_of(xml, RuleStage.START)
    if expected is not None:
        with pytest.raises(VirshError) as refused:
            console.ask(f"start {NAME} --paused")
        assert expected.libvirt_says in str(refused.value), xml
        tally.rules.add(expected.rule)
        tally.refused += 1
        return
    console.ask(f"start {NAME} --paused")
    live = parse(console.ask(f"dumpxml {NAME}").encode())
    console.ask(f"destroy {NAME}")
    domain = parse(xml)
    assert (live.started_with, live.order) == (domain.started_with, domain.order), xml
    tally.taken += 1


# libvirtd would die of these, at once or (the distances) soon, or has no QEMU for them.
NOT_ASKED = ("less than no vCPU", "more vCPUs than memory has room for", "a distance", "distances")
ASKED = {name: case for name, case in BROKEN.items() if not name.startswith(NOT_ASKED) and b"x86_64" in case.xml}


def test_libvirt_refuses_each_broken_document_with_the_words_that_we_say(
    console: Console, record_property: Callable[[str, object], None]
) -> None:
    with counted(record_property) as tally:
        for name, case in ASKED.items():
            (error,) = validate(case.xml)
            told = console.refusal(case.xml)
            if error.stage is RuleStage.START:
                assert not told, name
                with pytest.raises(VirshError) as refused:
                    console.ask("start broken --paused")
                told = str(refused.value)
            tally.differences += error.libvirt_says not in told
            assert error.libvirt_says in told, name
            tally.refused += 1
        assert len({case.rule for case in ASKED.values()}) >= len(DomainRule) - 6


def printed(console: Console, name: str = "broken", **parts: str) -> bytes:
    """Return libvirt's own document of one that it takes."""
    assert not console.refusal(broken_document(**parts))
    return console.ask(f"dumpxml --inactive {name}").encode()


def test_what_libvirt_fills_in_is_all_that_differs(console: Console) -> None:
    bare = {"os": "<os><type>hvm</type></os>"}
    ours, libvirts = parse(broken_document(**bare)), parse(printed(console, **bare))
    assert (ours.arch, ours.machine, ours.emulator, ours.cpu) == (None, None, None, None)
    assert libvirts.arch is not None
    assert libvirts.machine is not None
    assert libvirts.emulator is not None
    assert libvirts.cpu is not None
    assert replace(libvirts, arch=None, machine=None, emulator=None, cpu=None) == ours


def test_libvirt_makes_up_a_uuid(console: Console) -> None:
    assert parse(broken_document(uuid="")).uuid is None
    assert parse(printed(console, uuid="")).uuid is not None


def test_libvirt_resolves_an_alias_of_a_machine_type(console: Console) -> None:
    alias = PARTS["os"].replace("pc-q35-7.2", "q35")
    assert parse(broken_document(os=alias)).machine == "q35"
    assert str(parse(printed(console, os=alias)).machine).startswith("pc-q35-")


def test_clusters_count_for_us_and_for_this_libvirt_do_not(console: Console) -> None:
    cpu = "<cpu><topology sockets='2' clusters='2' cores='2' threads='1'/></cpu>"
    assert [each.rule for each in validate(broken_document(cpu=cpu))] == [DomainRule.TOPOLOGY_PRODUCT]
    assert b"clusters" not in printed(console, cpu=cpu)
    assert parse(broken_document(cpu=cpu, vcpu="<vcpu>8</vcpu>")).max == 8
    assert "CPU topology doesn't match" in console.refusal(broken_document(cpu=cpu, vcpu="<vcpu>8</vcpu>"))


def test_libvirt_takes_a_negative_number_for_one_that_it_is_not(console: Console) -> None:
    least = {"vcpu": "<vcpu>-4294967295</vcpu>"}
    assert [each.rule for each in validate(broken_document(**least))] == [DomainRule.COUNT_NEGATIVE]
    assert parse(printed(console, **least)).max == 1


def test_libvirt_has_other_words_for_no_vcpus_each_time(console: Console) -> None:
    none = {"vcpu": "<vcpu>0</vcpu>"}
    assert "in <numa>" in console.refusal(broken_document(**none))
    listed = {**none, "vcpus": "<vcpus><vcpu id='0' enabled='yes'/></vcpus>"}
    assert "is out of range of maximum vcpu count" in console.refusal(broken_document(**listed))
    assert validate(broken_document(**none))[0].rule is DomainRule.COUNT_ZERO


def test_libvirt_takes_a_document_type(console: Console) -> None:
    typed = {"domain": "<!DOCTYPE domain><domain type='qemu'>"}
    assert parse(printed(console, **typed)).max == 4
    with pytest.raises(DomainXmlError, match="a document type is not accepted"):
        parse(broken_document(**typed))


@pytest.mark.parametrize("part", ["memory", "os"])
def test_libvirt_wants_more_than_vcpus(console: Console, part: str) -> None:
    assert "must be specified" in console.refusal(broken_document(**{part: ""}))
    assert parse(broken_document(**{part: ""})).max == 4
