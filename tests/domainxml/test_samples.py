"""Documents of every kind are changed where the vCPUs are, and stay as they were written everywhere else."""

import re
from difflib import SequenceMatcher

import pytest

from qmpvcpu.domainxml import Instance, Metadata, parse, read_identity, render, update, validate
from tests.domainxml.documents import SAMPLES, one_plugged, one_unplugged, ours, outside, started_from

STARTED = {case: started_from(parse(xml)) for case, xml in SAMPLES.items()}
PLUGGED = {case: one_plugged(layout) for case, layout in STARTED.items()}
UNPLUGGED = {case: one_unplugged(layout) for case, layout in STARTED.items()}
# Some have no free slot, and some only vCPU 0.
CHANGED = {
    f"{case} {what}": (SAMPLES[case], layout)
    for what, layouts in (("plugged", PLUGGED), ("unplugged", UNPLUGGED))
    for case, layout in layouts.items()
    if layout is not None
}


def lines_of_ours(xml: bytes) -> set[int]:
    """Return the numbers of the lines, from 0 on, that these elements stand on."""
    return {
        line
        for start, _, _, end in ours(xml)
        for line in range(xml.count(b"\n", 0, start), xml.count(b"\n", 0, end) + 1)
    }


def element(xml: bytes, tag: bytes) -> list[bytes]:
    return re.findall(rb"<%b\b[^>]*/>|<%b\b.*?</%b>" % (tag, tag, tag), xml, re.DOTALL)


def test_there_are_samples_of_every_kind() -> None:
    texts = SAMPLES.values()
    assert len(SAMPLES) >= 30
    assert max(parse(text).max for text in texts) > 255
    assert any(parse(text).max == 255 and len(parse(text).numa) > 1 for text in texts)
    for what in (b"<!--", b"\r\n", b"\t", b"CDATA", b"qemu:commandline", b"\xef\xbb\xbf", b"encoding=", b"\xc3\xbc"):
        assert any(what in text for text in texts), what
    assert any(b"\n" not in text for text in texts)
    assert any(b"'" not in text for text in texts)
    assert len(CHANGED) > 60


@pytest.mark.parametrize("case", SAMPLES)
def test_libvirt_has_nothing_against_a_sample(case: str) -> None:
    assert validate(SAMPLES[case]) == ()


@pytest.mark.parametrize("case", SAMPLES)
def test_saying_what_a_document_says_leaves_it_as_it_is(case: str) -> None:
    base = SAMPLES[case]
    assert update(base, parse(base)) == base


@pytest.mark.parametrize("case", SAMPLES)
def test_rendering_the_vm_that_libvirt_starts_from_it_leaves_it_as_it_is(case: str) -> None:
    base = SAMPLES[case]
    assert render(STARTED[case], base=base) == base


@pytest.mark.parametrize("case", CHANGED)
def test_after_one_change_the_lines_that_differ_are_those_of_the_vcpus_and_our_own(case: str) -> None:
    base, after = CHANGED[case]
    result = render(after, base=base, metadata=Metadata(generation=1, instance=Instance(4711, 99)).with_layout(after))
    old, new = base.split(b"\n"), result.split(b"\n")
    for kind, low, high, first, last in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            assert set(range(low, high)) <= lines_of_ours(base), old[low:high]
            assert set(range(first, last)) <= lines_of_ours(result), new[first:last]
    assert outside(result) == outside(base)
    assert element(result, b"cputune") == element(base, b"cputune")


@pytest.mark.parametrize("case", CHANGED)
def test_after_one_change_it_says_so_and_libvirt_has_nothing_against_it(case: str) -> None:
    base, after = CHANGED[case]
    metadata = Metadata(generation=42).with_layout(after)
    result = render(after, base=base, metadata=metadata)
    said = parse(result)
    assert said.enabled == after.enabled
    assert started_from(said).creation == after.creation
    assert validate(result) == ()
    assert read_identity(result).metadata == metadata
    assert render(after, base=result, metadata=metadata) == result


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_that_is_taken_back_leaves_nothing_of_it_behind(case: str) -> None:
    base, after = CHANGED[case]
    before = started_from(parse(base))
    back = render(before, base=render(after, base=base))
    assert parse(back).enabled == before.enabled
    assert started_from(parse(back)).creation == before.creation
    assert outside(back) == outside(base)
