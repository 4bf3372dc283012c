"""Any change of any document keeps every byte outside of what it is about."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.domainxml import DomainVcpu, Metadata, ThreadSched, parse, update, validate
from qmpvcpu.model.vcpumap import VcpuMap
from tests.domainxml.documents import assert_says, outside

BLANKS = st.sampled_from(
    ["", "", "\n", "\n  ", "\r\n\t", " <!-- <vcpu>9</vcpu> -->\n ", "<?pi <vcpus> ?>", "\n\n    "]
)
SCHEDULERS = st.sampled_from(["scheduler='batch'", "priority='1' scheduler='fifo'", "scheduler='idle' priority='x'"])
OTHERS = st.sampled_from(
    [
        "<title>a &gt; b</title>",
        "<description><![CDATA[<vcpus>]]></description>",
        "<memory unit='MiB' >512</memory>",
        "<iothreads>1</iothreads>",
        "<os><type arch='x86_64' machine='q35'>hvm</type></os>",
        "<x:y xmlns:x='urn:x' vcpus='>'><x:vcpu>1</x:vcpu></x:y>",
        "<features><acpi /></features>",
        "<devices><emulator>/bin/q</emulator></devices>",
    ]
)


@st.composite
def any_state(draw: st.DrawFn, count: int) -> tuple[DomainVcpu, ...]:
    boot = draw(st.integers(1, count))
    late = draw(st.permutations(range(boot, count)))[: draw(st.integers(0, count - boot))]
    order = {vcpu: place for place, vcpu in enumerate([*range(boot), *late], start=1)}
    return tuple(DomainVcpu(each, each in order, each >= boot, order.get(each)) for each in range(count))


@st.composite
def any_document(draw: st.DrawFn) -> tuple[bytes, int]:
    """Return a document with what it says of vCPUs at any place, and its maximum."""
    count = draw(st.integers(1, 6))
    quote = draw(st.sampled_from("'\""))
    parts = draw(st.lists(OTHERS, unique=True))
    vcpus = draw(st.none() | any_state(count))
    parts.append("<name>a</name>")
    parts.append(f"<vcpu current={quote}{draw(st.integers(1, count))}{quote}>{count}</vcpu>")
    if vcpus is not None:
        rows = [
            f"<vcpu id='{vcpu.id}' enabled={quote}{'yes' if vcpu.enabled else 'no'}{quote} "
            f"hotpluggable='{'yes' if vcpu.hotpluggable else 'no'}'"
            + (f" order={quote}{vcpu.order}{quote}/>" if vcpu.order else " />")
            for vcpu in vcpus
            if vcpu.enabled or draw(st.booleans())
        ]
        parts.append(
            "<vcpus>" + "".join(draw(BLANKS) + row for row in draw(st.permutations(rows))) + draw(BLANKS) + "</vcpus>"
        )
    if draw(st.booleans()):
        pins = draw(st.lists(st.integers(0, count), unique=True))
        tunes = [f"<vcpupin vcpu='{pin}' cpuset={quote}0-1{quote}/>" for pin in pins]
        tunes += draw(st.sampled_from([[], ["<emulatorsched scheduler='idle' />"], ["<emulatorpin cpuset='3'/>"]]))
        half = draw(st.integers(0, count))
        groups = [",".join(map(str, each)) for each in (range(half), range(half, count)) if each]
        tunes += [f"<vcpusched vcpus='{each}' {draw(SCHEDULERS)}/>" for each in groups if draw(st.booleans())]
        inner = "".join(draw(BLANKS) + tune for tune in draw(st.permutations(tunes)))
        parts.append(f"<cputune>{draw(BLANKS)}{inner}</cputune>")
    if draw(st.booleans()):
        parts.append(draw(st.sampled_from(["<metadata/>", "<metadata><o:o xmlns:o='urn:o'/></metadata>"])))
    body = "".join(draw(BLANKS) + part for part in draw(st.permutations(parts)))
    return f"<domain type='kvm'>{body}{draw(BLANKS)}</domain>{draw(st.sampled_from(['', chr(10)]))}".encode(), count


@given(data=st.data())
def test_any_change_of_any_document_keeps_every_byte_outside_of_what_is_named(data: st.DataObject) -> None:
    base, count = data.draw(any_document())
    said = parse(base)
    pins = data.draw(st.dictionaries(st.integers(0, count - 1), st.sampled_from([VcpuMap([0]), VcpuMap([0, 1])])))
    scheds = st.sampled_from([ThreadSched("batch"), ThreadSched("fifo", 1), ThreadSched("rr", 99)])
    wanted = replace(
        said,
        scheds=data.draw(st.just(said.scheds) | st.dictionaries(st.integers(0, count - 1), scheds)),
        emulator_sched=data.draw(st.none() | scheds),
        vcpus=data.draw(st.just(said.vcpus) | any_state(count)),
        pins=data.draw(st.just(said.pins) | st.just(pins)),
        emulator_pin=data.draw(st.none() | st.just(VcpuMap([1]))),
    )
    metadata = data.draw(st.none() | st.just(Metadata(generation=3, pending=VcpuMap([1]))))
    result = update(base, wanted, metadata=metadata)
    assert outside(result) == outside(base)
    assert_says(parse(result), wanted)
    assert validate(result) == ()
    assert update(result, wanted, metadata=metadata) == result
    if wanted == said and metadata is None:
        assert result == base


@pytest.mark.parametrize("place", ["before its elements", "before its rows", "behind its rows", "in its rows"])
def test_a_hostile_document_is_not_multiplied_by_its_rows(place: str) -> None:
    blanks = "\n" + " " * 500_000
    pieces = {
        "before its elements": ("", blanks),
        "before its rows": (f"<vcpus>{blanks}<vcpu id='0' enabled='yes'/></vcpus>", ""),
        "behind its rows": (f"<vcpus>\n <vcpu id='0' enabled='yes'/>{'<!-- -->' * 90_000}\n</vcpus>", ""),
        "in its rows": (f"<vcpus><vcpu id='0' enabled='yes' {blanks}/></vcpus>", ""),
    }
    rows, before = pieces[place]
    base = (
        f"<domain type='kvm'>{before}<name>a</name>{before}<vcpu>2000</vcpu>{before}{rows}{before}</domain>".encode()
    )
    vcpus = (
        DomainVcpu(0, enabled=True, hotpluggable=False, order=1),
        *(DomainVcpu(each, enabled=True, hotpluggable=True, order=each + 1) for each in range(1, 2000)),
    )
    result = update(base, replace(parse(base), vcpus=vcpus))
    assert parse(result).current == 2000
    assert len(result) < len(base) + 1_000_000
