"""What a document may cost: its size is bounded where it is read, and time and memory go with its size."""

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest

from qmpvcpu import DomainXmlError, VcpuMap
from qmpvcpu.domainxml import Metadata, parse, read_identity, render, update, validate
from qmpvcpu.domainxml.next_boot import with_map
from tests.domainxml.examples import layout_of

HEAD = b"<domain type='kvm'><name>vm</name>"


def attributes(count: int) -> bytes:
    return b"".join(b" a%d=''" % each for each in range(count))


def one_line(count: int) -> bytes:
    first = b"<vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/>\n</vcpus>"
    return b"<!--%b--><vcpu current='1'>%d</vcpu>%b" % (b"x" * 400 * count, count, first)


def tunes(count: int) -> bytes:
    return b"<vcpu>%d</vcpu><cputune>%b</cputune>" % (count // 16, b"<x/>" * 6 * count)


def groups(count: int, size: int = 1) -> bytes:
    each = b"<cachetune vcpus='%d-%d'><cache/></cachetune>"
    inside = b"".join(each % (number, number + size - 1) for number in range(count // 2))
    return b"<vcpu>16384</vcpu><cputune>%b</cputune>" % inside


def tags(count: int) -> bytes:
    return b"".join(b"<a%d state='on'/>" % each for each in range(count))


QEMU_ARGS = b"<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>%b</q:commandline>"


def all_pinned(xml: bytes) -> object:
    domain = parse(xml)
    return update(xml, replace(domain, pins={each: VcpuMap([1]) for each in range(domain.max)}))


def every_second(xml: bytes) -> object:
    domain = parse(xml)
    return update(xml, with_map(domain, range(0, domain.max, 2)))


LARGE: dict[str, tuple[Callable[[int], bytes], Callable[[bytes], object]]] = {
    "attributes of the domain": (lambda n: b"<domain type='kvm'%b><name>vm</name>" % attributes(n), read_identity),
    "attributes of one element": (lambda n: HEAD + b"<x%b/>" % attributes(n), read_identity),
    "attributes of <vcpu>": (lambda n: HEAD + b"<vcpu%b>4</vcpu>" % attributes(n), read_identity),
    "attributes of a device": (lambda n: HEAD + b"<devices><controller%b/></devices>" % attributes(n), read_identity),
    "pins next to other elements": (lambda n: HEAD + tunes(n), all_pinned),
    "groups of one vCPU": (lambda n: HEAD + groups(n), validate),
    "groups that all overlap": (lambda n: HEAD + groups(n, 2), validate),
    "large groups": (lambda n: HEAD + groups(60, n), validate),
    "enlightenments that nobody knows": (
        lambda n: HEAD + b"<features><hyperv>%b</hyperv></features>" % tags(n),
        parse,
    ),
    "timers": (lambda n: HEAD + b"<clock>%b</clock>" % (b"<timer name='kvmclock' present='no'/>" * n), parse),
    "arguments": (lambda n: HEAD + QEMU_ARGS % (b"<q:arg value='%b-cpu'/>" % (b"{" * 20) * n), parse),
    "rows behind a long line": (lambda n: HEAD + one_line(n // 2), every_second),
}


def seconds(work: Callable[[], object]) -> float:
    def once() -> float:
        begin = time.thread_time()  # not of other processes' making
        work()
        return time.thread_time() - begin

    return min(once() for _ in range(3))


@pytest.mark.parametrize("what", LARGE)
def test_time_goes_with_the_size_and_not_with_its_square(what: str) -> None:
    make, work = LARGE[what]
    small, large = (make(each) + b"</domain>" for each in (2000, 16000))
    assert seconds(lambda: work(large)) < 28 * seconds(lambda: work(small)), (
        "8 times the size; its square is 64 times"
    )


FULL = {
    "bytes": (HEAD + b" " * 4 * 2**20 + b"</domain>", "larger than 4194304 bytes"),
    "elements": (HEAD + b"<a/>" * 2**17 + b"</domain>", "more than 131072 tags"),
    "comments": (HEAD + b"<!---->" * 2**17 + b"</domain>", "more than 131072 tags"),
    "a namespace": (HEAD + b"\n<a xmlns:b='%b'/></domain>" % (b"n" * 257), "line 2: a namespace of more than 256"),
    "the default namespace": (HEAD + b'<a\n\txmlns = "%b"/></domain>' % (b"'" * 257), "a namespace of more than 256"),
    "depth": (HEAD + b"<a>" * 300 + b"</a>" * 300 + b"</domain>", "not well-formed: Excessive depth"),
    "a name": (HEAD + b"<%b/></domain>" % (b"a" * 60_000), "not well-formed"),
}


@pytest.mark.parametrize("what", FULL)
def test_more_than_any_domain_has_is_refused_before_it_costs_anything(what: str) -> None:
    document, told = FULL[what]
    layout = layout_of(4, [0], boot=1)
    readers: list[Callable[[], object]] = [
        lambda: read_identity(document),
        lambda: parse(document),
        lambda: validate(document),
        lambda: render(layout, base=document, metadata=Metadata()),
    ]
    for read in readers:
        with pytest.raises(DomainXmlError, match=told) as caught:
            read()
        assert len(str(caught.value)) < 1000


def test_what_16384_vcpus_take_is_read() -> None:
    rows = b"".join(
        b"<vcpu id='%d' enabled='%b' hotpluggable='%b'/>" % (each, *((b"no", b"yes") if each else (b"yes", b"no")))
        for each in range(16384)
    )
    pins = b"".join(b"<vcpupin vcpu='%d' cpuset='%d'/>" % (each, each % 512) for each in range(16384))
    machine = b"<os><type arch='s390x' machine='x'>hvm</type></os>"
    body = b"<vcpu>16384</vcpu><vcpus>%b</vcpus><cputune>%b</cputune>%b" % (rows, pins, machine)
    document = HEAD + body + b"</domain>"
    domain = parse(document)
    assert (domain.max, len(domain.pins)) == (16384, 16384)
    assert parse(update(document, with_map(domain, range(16384)))).current == 16384


@pytest.mark.parametrize(
    "inside",
    [
        b"".join(b"<n:a%d/>" % each for each in range(20_000)),
        b"<n:a%b/>" % b"".join(b" n:a%d=''" % each for each in range(20_000)),
    ],
    ids=["elements", "attributes"],
)
def test_a_namespace_is_not_paid_for_with_each_name(inside: bytes) -> None:
    document = b"<domain xmlns:n='%b' type='kvm'><name>vm</name>%b</domain>" % (b"n" * 250, inside)
    tracemalloc.start()
    try:
        assert len(read_identity(document).foreign) <= 100
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 50 * len(document)


def test_no_more_than_a_thousand_broken_rules_are_told() -> None:
    rows = b"<vcpu id='x' enabled='x'/>" * 5000
    document = HEAD + b"<vcpu>4</vcpu><vcpus>%b</vcpus></domain>" % rows
    assert len(validate(document)) == 1000
    with pytest.raises(DomainXmlError, match="id"):
        parse(document)
