"""libvirt as the oracle: of hundreds of domains it takes what we take, refuses what we refuse, and reads what we read.

What is compared, for each generated document:

* at define (without its schema, which is another matter): libvirt takes it if and only if no rule of stage DEFINE is
  broken; if it refuses it, then with the words of the first rule that we find broken;
* what ``virsh dumpxml --inactive`` prints of it reads as the document itself does, save for what is ``TOLERATED``;
* for some, at start: libvirt starts it if and only if no rule of stage START is broken, and then the vCPUs are plugged
  in the order that ``parse`` tells.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings

from qmpvcpu.domainxml import parse, validate
from qmpvcpu.errors import DomainRule, DomainRuleError, RuleStage
from qmpvcpu.testing.qemu import find_qemus
from tests.libvirt.conftest import COMPARED
from tests.libvirt.console import Console, open_console
from tests.libvirt.daemon import Libvirt, VirshError
from tests.libvirt.domains import NAME, Machine, any_document, document, document_with_rows

pytestmark = [pytest.mark.libvirt, pytest.mark.timeout(150)]

QEMUS = find_qemus()
LIMITS = {"pc-i440fx-7.2": 255, "pc-q35-7.2": 288, "pc-i440fx-10.0": 255, "pc-q35-10.0": 4096}
MACHINES = [
    Machine(name, str(path), LIMITS[name])
    for version, path in QEMUS.items()
    for name in (f"pc-i440fx-{version}", f"pc-q35-{version}")
    if name in LIMITS
]
MOST_DEFINED = 400
MOST_STARTED = 40

# What differs between the two and is meant to; each is shown by a test below, so that this list cannot go stale.
TOLERATED = {
    "uuid": "libvirt makes one up where there is none: a document read twice must read alike",
    "machine": "libvirt resolves an alias (q35), and fills in a default, from its own QEMU: we ask none",
    "emulator": "libvirt fills in the QEMU that it has for the architecture",
    "arch": "libvirt fills in its host's",
    "cpu": "where no model is named libvirt fills in the machine's default one, which only QEMU knows",
    "clusters": "libvirt 9.0.0 does not read the attribute and leaves it out of the product; since 10.1 it counts",
    "no vCPUs": "libvirt has no words for <vcpu>0</vcpu>: it refuses whatever it stumbles over first",
    "negative": "libvirt takes -1 for 4294967295 vCPUs, which kills libvirtd 9.0.0, and -4294967295 for 1: refused",
    "document type": "libvirt takes a document type; no domain has use for one, and each attack by entities needs one",
    "no memory": "libvirt refuses a domain without <memory> or <os>; a part of a document is read for its vCPUs",
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
    if expected.rule is not DomainRule.COUNT_ZERO:  # TOLERATED: "no vCPUs"
        assert expected.libvirt_says in told, f"libvirt refuses it for another reason than we do: {expected}\n{told}"
    tally.rules.add(expected.rule)
    tally.refused += 1


def compare_printed(printed: bytes, xml: bytes) -> None:
    """Assert that libvirt's own document reads as the one that it was given."""
    doomed = first_of(xml, RuleStage.START)
    if doomed is not None and doomed.rule not in {DomainRule.ORDER_TWICE, DomainRule.ORDER_ABOVE_MAX}:
        # What libvirt fills in breaks a rule that it has checked before: it prints what it would not take again.
        with pytest.raises(DomainRuleError) as again:
            parse(printed)
        assert again.value.rule is doomed.rule
        return
    given_domain, printed_domain = parse(xml), parse(printed)
    if given_domain.cpu is None:  # TOLERATED: "cpu"
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


def test_libvirt_starts_what_we_say_that_it_starts(
    console: Console, record_property: Callable[[str, object], None]
) -> None:
    with counted(record_property) as tally:

        @settings(max_examples=MOST_STARTED, deadline=None, suppress_health_check=list(HealthCheck))
        @given(xml=document_with_rows(MACHINES))
        def compare(xml: bytes) -> None:
            if xml in tally.seen or first_of(xml, RuleStage.DEFINE) is not None:
                return
            tally.seen.add(xml)
            try:
                compare_start(console, xml, tally)
            except AssertionError:
                tally.differences += 1
                tally.seen.discard(xml)
                raise

        compare()
        assert tally.taken + tally.refused >= 20


def compare_start(console: Console, xml: bytes, tally: Tally) -> None:
    """Assert that libvirt starts it as we say, or refuses to as we say."""
    assert not console.refusal(xml)
    expected = first_of(xml, RuleStage.START)
    try:
        console.ask(f"start {NAME} --paused")
    except VirshError as error:
        assert expected is not None, error
        assert expected.libvirt_says in str(error)
        tally.refused += 1
        return
    try:
        live = parse(console.ask(f"dumpxml {NAME}").encode())
    finally:
        console.ask(f"destroy {NAME}")
    assert expected is None, f"libvirt starts what we say that it does not: {expected}"
    domain = parse(xml)
    assert (live.started_with, live.order) == (domain.started_with, domain.order)
    tally.taken += 1
