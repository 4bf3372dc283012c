"""libvirt as the oracle of the next boot: the same changes of the same definitions, by virsh and by us.

After each change what ``virsh dumpxml --inactive`` says of the vCPUs is what we make of it, save for what is
``TOLERATED``; what we make of it libvirt takes, prints as it is, and, for some, starts with the vCPUs in our order.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpvcpu.domainxml import DomainVcpus, parse, update
from qmpvcpu.domainxml.next_boot import with_count, with_map, with_max, with_state
from qmpvcpu.errors import ConfigDeniedError
from tests.domainxml.domains import document, domain_of_rows, domains, said, started
from tests.libvirt.console import Console, open_console
from tests.libvirt.daemon import Libvirt, VirshError
from tests.substrates import qemus

pytestmark = pytest.mark.libvirt

QEMUS = qemus()
NEWEST = max(QEMUS, key=lambda version: tuple(map(int, version.split("."))))
UUID = "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a"
MOST_COMPARED = 120
MOST_STARTED = 15

# What differs between the two and is meant to, as in docs/next-boot.md; an example below shows each, so that none
# goes stale.
TOLERATED = {
    "order": "libvirt clears every order, and so starts another VM: we keep the order of those that stay",
    "vCPU 0 in": "libvirt refuses to enable vCPU 0, which is what it is: that asks for nothing",
    "followers": "libvirt refuses one that QEMU starts with before others such: we make the others hotpluggable",
    "so already": "libvirt makes a vCPU hotpluggable by enabling it again: that asks for nothing",
    "rows": "libvirt prints <vcpus> once a vCPU was named, also where nothing changed: we leave the document",
    "new rows": "libvirt prints new rows of a higher maximum without hotpluggable: ours are complete",
}

Step = tuple[str, frozenset[int] | int, bool]


@pytest.fixture
def console(libvirt: Libvirt) -> Iterator[Console]:
    with open_console(libvirt) as opened:
        yield opened


def on_libvirt(domain: DomainVcpus) -> DomainVcpus:
    """Return *domain* as one that libvirt knows again, and can start."""
    return replace(domain, uuid=UUID, emulator=str(QEMUS[NEWEST]))


def asked(step: Step) -> str:
    """Return the words for virsh."""
    what, of, flag = step
    if isinstance(of, int):
        return f"setvcpus vm {of} --config{' --maximum' if what == 'max' else ' --hotpluggable' if flag else ''}"
    return f"setvcpu vm {','.join(map(str, sorted(of)))} --config --{'enable' if flag else 'disable'}"


def ours(domain: DomainVcpus, step: Step) -> DomainVcpus | None:
    """Return what we make of *domain*, or None if we deny it."""
    what, of, flag = step
    try:
        if not isinstance(of, int):
            return with_state(domain, of, enabled=flag)
        return with_max(domain, of) if what == "max" else with_count(domain, of, hotpluggable=flag)
    except ConfigDeniedError:
        return None


def theirs(console: Console, step: Step) -> tuple[bytes, str]:
    """Return what libvirt makes of it, and what it says against it, or ""."""
    refusal = ""
    try:
        console.ask(asked(step))
    except VirshError as error:
        refusal = str(error)
    return console.ask("dumpxml --inactive vm").encode(), refusal


def define(console: Console, xml: bytes) -> bytes:
    """Have libvirt take a document, and return its own of it."""
    refusal = console.refusal(xml)
    assert not refusal, refusal
    return console.ask("dumpxml --inactive vm").encode()


def unordered(domain: DomainVcpus) -> list[tuple[bool, bool]]:
    return [(row.enabled, row.hotpluggable) for row in domain.vcpus]


def compare(before: DomainVcpus, step: Step, changed: DomainVcpus | None, xml: bytes, refusal: str) -> set[str]:
    """Assert that what libvirt did is what we do; return what of TOLERATED it took."""
    found = parse(xml)
    _, of, flag = step
    if changed is None:
        assert refusal, f"we deny what libvirt takes: {said(before)}, {asked(step)}: {said(found)}"
        return set()
    if refusal:
        assert not isinstance(of, int), refusal
        if 0 in of and flag:
            assert "vCPU '0' can't be modified" in refusal
            return {"vCPU 0 in"}
        assert "followed by non-hotpluggable online vcpus" in refusal, (said(before), asked(step), refusal)
        return {"followers"}
    took = set()
    if "<vcpu id" in xml.decode() and re.search(r"<vcpu id='\d+' enabled='no'(/| order)", xml.decode()):
        took.add("new rows")
    if any(row.order for row in changed.vcpus):
        took.add("order")
        assert not any(row.order for row in found.vcpus)
    if unordered(found) != unordered(changed):
        assert not isinstance(of, int)
        again = [
            (row.enabled, row.hotpluggable or (row.id in of and before.vcpus[row.id].enabled == flag))
            for row in changed.vcpus
        ]
        assert unordered(found) == again, (said(before), asked(step), said(found), said(changed))
        took.add("so already")
    if found.individual != changed.individual:
        assert found.individual
        assert changed is before, (said(before), asked(step))
        took.add("rows")
    assert [cell.cpus for cell in found.numa] == [cell.cpus for cell in changed.numa]
    return took


def compare_printed(console: Console, base: bytes, changed: DomainVcpus) -> bytes:
    """Have libvirt take *base* with *changed* in it, and return what it prints, which says the same."""
    printed = define(console, update(base, changed))
    assert parse(printed).vcpus == changed.vcpus
    assert parse(printed).numa == changed.numa
    return printed


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("count"), st.integers(1, 9), st.booleans()),
        st.tuples(st.just("max"), st.integers(1, 9), st.just(True)),  # noqa: FBT003 -- one strategy of several
        st.tuples(st.just("state"), st.frozensets(st.integers(1, 8), min_size=1, max_size=4), st.booleans()),
        st.tuples(st.just("state"), st.frozensets(st.integers(0, 9), min_size=1, max_size=3), st.booleans()),
    ),
    min_size=1,
    max_size=5,
)


def test_the_same_changes_of_the_same_definition_come_to_the_same(
    console: Console, record_property: Callable[[str, object], None]
) -> None:
    met: Counter[str] = Counter()
    compared = Counter[str]()

    @settings(max_examples=MOST_COMPARED, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(domain=domains(), steps=STEPS)
    def run(domain: DomainVcpus, steps: list[Step]) -> None:
        printed = define(console, document(on_libvirt(domain)))
        domain = parse(printed)
        for step in steps:
            changed = ours(domain, step)
            after, refusal = theirs(console, step)
            took = compare(domain, step, changed, after, refusal)
            met.update(took)
            compared["refused by both" if changed is None else "beyond libvirt" if refusal else "the same"] += 1
            if changed is not None:
                # Where both say the same, libvirt goes on from its own.
                printed = compare_printed(console, printed, changed) if took or refusal else after
            domain = parse(printed)

    run()
    for name, number in compared.items():
        record_property(f"changes of the next boot, {name}", number)
    assert set(met) <= set(TOLERATED)
    assert sum(compared.values()) > MOST_COMPARED
    assert min(compared.values()) > 10


EXAMPLES: dict[str, tuple[str, Step]] = {
    "order": ("0cb-", ("state", frozenset({3}), True)),
    "vCPU 0 in": ("00--", ("state", frozenset({0}), True)),
    "followers": ("0000", ("state", frozenset({2}), False)),
    "so already": ("00-+", ("state", frozenset({1}), True)),
    "rows": ("00--", ("state", frozenset({3}), False)),
    "new rows": ("0-+-", ("max", 6, True)),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_each_difference_is_there(console: Console, name: str) -> None:
    rows, step = EXAMPLES[name]
    domain = parse(base := define(console, document(on_libvirt(domain_of_rows(rows)))))
    changed = ours(domain, step)
    assert changed is not None
    assert compare(domain, step, changed, *theirs(console, step)) == {name}
    compare_printed(console, base, changed)


def test_what_is_changed_libvirt_starts_with_the_vcpus_that_were_wished_in_our_order(
    console: Console, record_property: Callable[[str, object], None]
) -> None:
    seen = set()

    @settings(max_examples=MOST_STARTED, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(domain=domains(), wish=st.frozensets(st.integers(1, 8)))
    def run(domain: DomainVcpus, wish: frozenset[int]) -> None:
        base = define(console, document(on_libvirt(domain)))
        changed = with_map(parse(base), {0} | {each for each in wish if each < domain.max})
        define(console, update(base, changed))
        console.ask("start vm --paused")
        live = parse(console.ask("dumpxml vm").encode())
        console.ask("destroy vm")
        assert live.enabled == changed.enabled
        assert started(live) == started(changed)
        seen.add(said(changed))

    run()
    record_property("next boots started", len(seen))
    assert len(seen) > MOST_STARTED // 2


@pytest.mark.parametrize(
    ("rows", "step", "words"),
    [
        ("00--", ("state", frozenset({0}), False), "vCPU '0' can't be modified"),
        ("00--", ("count", 5, False), "requested vcpus is greater than max allowable"),
        ("00--", ("state", frozenset({4}), True), "vcpu 4 is not present in persistent config"),
    ],
)
def test_what_we_deny_libvirt_refuses(console: Console, rows: str, step: Step, words: str) -> None:
    define(console, document(on_libvirt(domain_of_rows(rows))))
    assert ours(domain_of_rows(rows), step) is None
    assert words in theirs(console, step)[1]


def test_a_maximum_that_does_not_fit_is_refused_by_both(console: Console) -> None:
    xml = document(on_libvirt(domain_of_rows("00--"))).replace(
        b"</features>", b"</features><cpu><topology sockets='2' dies='1' cores='2' threads='1'/></cpu>"
    )
    domain = parse(define(console, xml))
    assert ours(domain, ("max", 6, True)) is None
    assert "CPU topology doesn't match the desired vcpu count" in theirs(console, ("max", 6, True))[1]
    xml = document(on_libvirt(domain_of_rows("00--"))).replace(
        b"</features>", b"</features><cpu><numa><cell id='0' cpus='0-3' memory='65536' unit='KiB'/></numa></cpu>"
    )
    domain = parse(define(console, xml))
    assert ours(domain, ("max", 3, True)) is None
    assert "exceeds the desired maximum vcpu count" in theirs(console, ("max", 3, True))[1]
