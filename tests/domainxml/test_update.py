"""What a document says of vCPUs is changed element by element, and only where it has to say something else."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qmpvcpu.domainxml import DomainVcpu, NumaCell, ThreadSched, parse, update
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from tests.domainxml.documents import SAMPLES, VCPU, changed, document, inserted, states

# --- <vcpu> and <vcpus>

ROWS = """  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
    <vcpu id='1' enabled='no' hotpluggable='yes'/>
    <vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/>
    <vcpu id='3' enabled='no' hotpluggable='yes'/>
  </vcpus>"""


@pytest.mark.parametrize(
    ("before", "after"), [("bb--", "bbb-"), ("bb--", "b---"), ("bb--", "bbbb"), ("bbbb", "bb--")]
)
def test_a_state_that_a_count_can_say_changes_the_count_and_needs_no_rows(before: str, after: str) -> None:
    current = {"bb--": " current='2'", "bbbb": ""}
    base = document(f"  <vcpu placement='static'{current[before]}>4</vcpu>")
    expected = "" if after == "bbbb" else f" current='{after.count('b')}'"
    assert changed(base, vcpus=states(after)) == document(f"  <vcpu placement='static'{expected}>4</vcpu>").decode()


@pytest.mark.parametrize("after", ["bb-h", "b-h-", "bbh-", "bhhh"])
def test_any_other_state_puts_rows_behind_the_count_as_libvirt_prints_them(after: str) -> None:
    base = document(VCPU, "  <os/>")
    result = changed(base, vcpus=states(after))
    rows = re.findall(r"  <vcpus>\n(.*?)  </vcpus>\n  <os/>", result, re.DOTALL)
    assert len(rows) == 1
    printed = [line.strip() for line in rows[0].splitlines()]
    place = {
        letter: f"enabled='{on}' hotpluggable='{hot}'"
        for letter, on, hot in (("b", "yes", "no"), ("h", "yes", "yes"))
    }
    orders = iter(range(1, 5))
    assert printed == [
        f"<vcpu id='{number}' enabled='no' hotpluggable='yes'/>"
        if letter == "-"
        else f"<vcpu id='{number}' {place[letter]} order='{next(orders)}'/>"
        for number, letter in enumerate(after)
    ]


def test_only_rows_that_change_are_written_anew() -> None:
    base = document(VCPU, ROWS)
    result = changed(base, vcpus=states("b-hh"))
    assert result == base.decode().replace("current='2'", "current='3'").replace(
        "<vcpu id='3' enabled='no' hotpluggable='yes'/>", "<vcpu id='3' enabled='yes' hotpluggable='yes' order='3'/>"
    )


def test_a_row_keeps_its_quotes_its_blanks_and_what_is_not_known_of_it() -> None:
    base = document(
        VCPU,
        '  <vcpus><vcpu  id="0"  enabled="yes" q="x"\n/><vcpu enabled = "no" id= "3" note="a>b" ></vcpu></vcpus>',
    )
    result = changed(base, vcpus=states("b--h"))
    assert '<vcpu  id="0"  enabled="yes" hotpluggable="no" order="1" q="x"\n/>' in result
    assert '<vcpu enabled = "yes" id= "3" hotpluggable="yes" order="2" note="a>b" ></vcpu>' in result


def test_orders_of_the_same_sequence_stay_and_are_dense_once_a_state_changes() -> None:
    rows = ROWS.replace("order='2'", "order='4'").replace(
        "id='3' enabled='no' hotpluggable='yes'", "id='3' enabled='no' hotpluggable='yes' order='3'"
    )
    base = document(VCPU, rows)
    assert changed(base, vcpus=states("b-h-")) == base.decode()
    orders = re.findall(r"id='(\d)'.*order='(\d)'", changed(base, vcpus=states("bhh-")))
    assert orders == [("0", "1"), ("1", "2"), ("2", "3")]


def test_another_order_of_the_same_vcpus_is_written() -> None:
    base = document(
        VCPU,
        ROWS.replace("id='3' enabled='no' hotpluggable='yes'", "id='3' enabled='yes' hotpluggable='yes' order='3'"),
    )
    vcpus = list(states("b-hh"))
    vcpus[2], vcpus[3] = replace(vcpus[2], order=3), replace(vcpus[3], order=2)
    assert re.findall(r"id='(\d)'.*order='(\d)'", changed(base, vcpus=tuple(vcpus))) == [
        ("0", "1"),
        ("2", "3"),
        ("3", "2"),
    ]


def test_a_row_that_is_missing_is_put_behind_that_of_the_vcpu_before_it() -> None:
    base = document(
        VCPU,
        "  <vcpus>",
        "    <vcpu id='3' enabled='no'/> <!-- three -->",
        "    <vcpu id='0' enabled='yes'/> <!-- zero -->",
        "  </vcpus>",
    )
    result = changed(base, vcpus=states("b-h-"))
    assert "<!-- zero -->\n    <vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/>\n  </vcpus>" in result
    assert "<vcpu id='3' enabled='no'/> <!-- three -->" in result
    assert "id='1'" not in result


def test_rows_go_where_they_are_not_to_be() -> None:
    base = document(VCPU, ROWS, "  <os/>")
    result = update(base, replace(parse(base), vcpus=states("bbb-"), individual=False))
    assert result.decode() == document(VCPU.replace("'2'", "'3'"), "  <os/>").decode()


@pytest.mark.parametrize("empty", ["<vcpus/>", "<vcpus></vcpus>", "<vcpus>\n  </vcpus>"])
def test_rows_that_are_empty_are_filled(empty: str) -> None:
    base = document(VCPU, f"  {empty}")
    result = changed(base, vcpus=states("b-h-"))
    assert result == document(VCPU, ROWS).decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", "6"),
        ("\n    4", "\n    6"),
        ("+4", "+6"),
        ("4<!-- was 2 -->", "6<!-- was 2 -->"),
        ("<!-- 4 -->4", "<!-- 4 -->6"),
        ("&#52;", "6"),
        ("<![CDATA[4]]>", "6"),
    ],
)
def test_a_new_maximum_takes_the_place_of_the_old_one(text: str, expected: str) -> None:
    base = document(f"  <vcpu current='2'>{text}</vcpu>")
    assert changed(base, vcpus=states("bb----")) == base.decode().replace(f">{text}<", f">{expected}<")


def test_a_higher_maximum_says_how_many_are_on_and_gets_rows_where_all_had_one() -> None:
    base = document("  <vcpu>4</vcpu>", ROWS)
    rows = [f"    <vcpu id='{each}' enabled='no' hotpluggable='yes'/>" for each in (4, 5)]
    expected = document("  <vcpu current='2'>6</vcpu>", *ROWS.split("\n")[:-1], *rows, "  </vcpus>")
    assert changed(base, vcpus=states("b-h---")) == expected.decode()


def test_a_lower_maximum_takes_the_rows_above_it_out() -> None:
    base = document(VCPU, ROWS)
    assert changed(base, vcpus=states("b-h")) == "".join(
        line for line in base.decode().replace(">4<", ">3<").splitlines(keepends=True) if "id='3'" not in line
    )


def test_a_document_without_a_count_gets_one() -> None:
    base = document("  <memory>1</memory>", "  <os/>")
    result = changed(base, vcpus=states("b-h-"))
    assert inserted(base, result) == [VCPU, *ROWS.split("\n")]
    assert result.index("<memory>") < result.index("<vcpu ") < result.index("<vcpus>") < result.index("<os/>")


@pytest.mark.parametrize(
    ("given", "values", "expected"),
    [
        ("placement='static' cpuset='0-3'", {"cpuset": VcpuMap([1])}, "placement='static' cpuset='1'"),
        ("current='4'", {"cpuset": VcpuMap([0, 1])}, "cpuset='0-1' current='4'"),
        ("cpuset='0-3,^1' current='4'", {"cpuset": None}, "current='4'"),
        ("cpuset='0-3,^1,'", {"cpuset": VcpuMap([0, 2, 3])}, "cpuset='0-3,^1,'"),
        ("placement='auto' cpuset='7'", {"placement": "static", "cpuset": None}, "placement='static'"),
        (
            "placement='auto' cpuset='7'",
            {"placement": "static", "cpuset": VcpuMap([7])},
            "placement='static' cpuset='7'",
        ),
        ("cpuset='7'", {"placement": "auto", "cpuset": None}, "placement='auto'"),
    ],
)
def test_where_vcpus_may_run_is_said_by_the_count(given: str, values: dict[str, Any], expected: str) -> None:
    base = document(f"  <vcpu {given}>4</vcpu>")
    assert changed(base, **values) == base.decode().replace(given, expected)


@pytest.mark.parametrize(
    ("vcpus", "told"),
    [
        ((), "at least one"),
        ((DomainVcpu(1, enabled=True, hotpluggable=False),), "numbered from 0"),
        ((DomainVcpu(0, enabled=False, hotpluggable=True),), "vCPU 0"),
        ((DomainVcpu(0, enabled=True, hotpluggable=True),), "vCPU 0"),
        ((DomainVcpu(0, enabled=True, hotpluggable=False, order=2),), "vCPU 0"),
        (
            (*states("b")[:1], DomainVcpu(1, enabled=False, hotpluggable=False, order=2)),
            "vCPU 1: a disabled vCPU",
        ),
        ((*states("b")[:1], DomainVcpu(1, enabled=True, hotpluggable=True)), "every enabled vCPU has an order"),
        (states("b-b"), "vCPU 2: the ids of vCPUs that QEMU starts with are below"),
        (states("bhb"), "vCPU 2: the ids of vCPUs that QEMU starts with are below"),
    ],
)
def test_a_state_that_libvirt_refuses_is_refused(vcpus: Sequence[DomainVcpu], told: str) -> None:
    base = document(VCPU)
    with pytest.raises(DomainXmlError, match=told):
        update(base, replace(parse(base), vcpus=tuple(vcpus)))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"topology": Topology(6, cores=6)}, "multiply to the maximum number of vCPUs"),
        ({"vcpus": states("bb----"), "topology": Topology(4, cores=4)}, "multiply to the maximum number of vCPUs"),
        ({"cpuset": VcpuMap()}, "a cpuset is ids and ranges"),
        ({"pins": {0: VcpuMap()}}, "a cpuset is ids and ranges"),
        ({"pins": {4: VcpuMap([0])}}, "something else than was asked for: pins"),
        ({"scheds": {4: ThreadSched("batch")}}, "vCPUs below the maximum"),
        ({"placement": "auto", "cpuset": VcpuMap([0])}, "something else than was asked for: cpuset"),
    ],
)
def test_what_libvirt_would_refuse_or_drop_is_refused(values: dict[str, Any], told: str) -> None:
    base = document(VCPU)
    with pytest.raises(DomainXmlError, match=told):
        update(base, replace(parse(base), **values))


def test_half_a_core_is_refused() -> None:
    base = SAMPLES["ppc64-whole-cores"]
    domain = parse(base)
    half = tuple(replace(vcpu, enabled=vcpu.id < 12, order=1 if vcpu.id < 12 else None) for vcpu in domain.vcpus)
    with pytest.raises(DomainXmlError, match="whole cores"):
        update(base, replace(domain, vcpus=half))


# --- <cputune>

TUNED = """  <cputune>
    <shares>2048</shares>
    <vcpupin vcpu='0' cpuset='0'/> <!-- zero -->
    <vcpupin vcpu='2' cpuset="0-1,^0"/>
    <emulatorpin cpuset='1'/>
    <iothreadpin iothread='1' cpuset='0'/>
    <vcpusched vcpus='0-2' scheduler='fifo' priority='1'/>
  </cputune>"""
PINS = {0: VcpuMap([0]), 2: VcpuMap([1])}


def test_pins_change_come_and_go_each_by_itself() -> None:
    base = document(VCPU, TUNED)
    result = changed(base, pins={0: VcpuMap([0, 1]), 1: VcpuMap([1]), 3: VcpuMap([0])})
    assert result == base.decode().replace(
        "'0' cpuset='0'/> <!-- zero -->", "'0' cpuset='0-1'/> <!-- zero -->\n    <vcpupin vcpu='1' cpuset='1'/>"
    ).replace("\n    <vcpupin vcpu='2' cpuset=\"0-1,^0\"/>", "\n    <vcpupin vcpu='3' cpuset='0'/>")


def test_without_cputune_it_is_made_behind_the_vcpus() -> None:
    base = document(VCPU, ROWS, "  <iothreads>2</iothreads>", "  <os/>")
    result = changed(base, pins=PINS, emulator_pin=VcpuMap([0]), scheds=dict.fromkeys([0, 1], ThreadSched("rr", 5)))
    assert inserted(base, result) == [
        "  <cputune>",
        "    <vcpupin vcpu='0' cpuset='0'/>",
        "    <vcpupin vcpu='2' cpuset='1'/>",
        "    <emulatorpin cpuset='0'/>",
        "    <vcpusched vcpus='0' scheduler='rr' priority='5'/>",
        "    <vcpusched vcpus='1' scheduler='rr' priority='5'/>",
        "  </cputune>",
    ]
    assert "</iothreads>\n  <cputune>" in result


@pytest.mark.parametrize("empty", ["<cputune/>", "<cputune></cputune>", "<cputune>\n  </cputune>"])
def test_an_empty_cputune_is_filled_in_libvirts_order(empty: str) -> None:
    base = document(VCPU, f"  {empty}")
    result = changed(base, pins=PINS, emulator_pin=VcpuMap([0]), scheds={1: ThreadSched("idle")})
    assert re.findall(r"<(vcpupin|emulatorpin|vcpusched|/cputune)", result) == [
        *("vcpupin", "vcpupin", "emulatorpin", "vcpusched", "/cputune")
    ]


@pytest.mark.parametrize("pin", [VcpuMap([0, 1]), None])
def test_the_emulators_pin_changes_and_goes(pin: VcpuMap | None) -> None:
    base = document(VCPU, TUNED)
    line = "    <emulatorpin cpuset='1'/>\n"
    expected = "" if pin is None else line.replace("'1'", f"'{pin}'")
    assert changed(base, emulator_pin=pin) == base.decode().replace(line, expected)


def test_schedulers_that_still_hold_keep_their_elements() -> None:
    base = document(VCPU, TUNED)
    scheds = {0: ThreadSched("fifo", 1), 1: ThreadSched("batch"), 2: ThreadSched("fifo", 1)}
    line = "    <vcpusched vcpus='0-2' scheduler='fifo' priority='1'/>\n"
    assert changed(base, scheds=scheds) == base.decode().replace(
        line, line.replace("0-2", "0,2") + "    <vcpusched vcpus='1' scheduler='batch'/>\n"
    )
    assert changed(base, scheds={}) == base.decode().replace(line, "")
    two = document(VCPU, "  <cputune>", line + "    <vcpusched vcpus='3' scheduler='idle'/>", "  </cputune>")
    assert changed(two, scheds=parse(base).scheds) == document(VCPU, "  <cputune>", line + "  </cputune>").decode()


def test_schedulers_in_other_words_stay() -> None:
    rows = [
        "    <vcpusched vcpus='1' scheduler='rr' priority='2'/>",
        "    <vcpusched vcpus='0' scheduler='rr' priority='2'/>",
    ]
    base = document(VCPU, "  <cputune>", *rows, "  </cputune>")
    assert changed(base, scheds=dict.fromkeys([0, 1], ThreadSched("rr", 2))) == base.decode()


def test_the_pin_of_a_vcpu_that_cannot_be_does_not_come_alive_with_a_higher_maximum() -> None:
    base = document(
        VCPU, "  <cputune>\n    <vcpupin vcpu='5' cpuset='0'/>\n    <vcpupin vcpu='9' cpuset='0'/>\n  </cputune>"
    )
    assert parse(base).pins == {}
    result = changed(base, vcpus=states("bb----"))
    assert "vcpu='5'" not in result
    assert "<vcpupin vcpu='9' cpuset='0'/>" in result


# --- <cpu>


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (
            "  <features/>",
            "  <features/>\n  <cpu>\n    TOPOLOGY\n  </cpu>",
        ),
        (
            "  <cpu mode='maximum'/>",
            "  <cpu mode='maximum'>\n    TOPOLOGY\n  </cpu>",
        ),
        (
            "  <cpu>\n    <model>qemu64</model>\n    <feature name='x'/>\n  </cpu>",
            "  <cpu>\n    <model>qemu64</model>\n    TOPOLOGY\n    <feature name='x'/>\n  </cpu>",
        ),
        (
            '  <cpu><topology threads="4" cores="1" sockets="1"/></cpu>',
            '  <cpu><topology threads="2" cores="2" sockets="1"/></cpu>',
        ),
    ],
)
def test_a_topology_is_put_in_or_changed(before: str, expected: str) -> None:
    base = document(VCPU, before)
    expected = expected.replace("TOPOLOGY", "<topology sockets='1' dies='1' cores='2' threads='2'/>")
    assert changed(base, topology=Topology(4, cores=2, threads=2)) == base.decode().replace(before, expected)


def test_a_topology_gets_clusters_and_goes() -> None:
    topology = "    <topology sockets='2' dies='1' cores='2' threads='1'/>\n"
    base = document(VCPU, f"  <cpu>\n{topology}  </cpu>")
    result = changed(base, topology=Topology(4, clusters=2, cores=2))
    assert "<topology sockets='1' dies='1' clusters='2' cores='2' threads='1'/>" in result
    assert changed(base, topology=None) == base.decode().replace(topology, "")


def test_a_topology_that_libvirt_has_no_words_for_is_refused() -> None:
    base = document(VCPU)
    with pytest.raises(DomainXmlError, match="cannot express modules"):
        update(base, replace(parse(base), topology=Topology(4, modules=2, cores=2)))


def test_the_cells_take_in_the_vcpus_of_a_new_maximum() -> None:
    cells = "<cell id='0' cpus='0-1' memory='1'/><cell id='1' memory='1' cpus=\"2-3\"/>"
    base = document(VCPU, f"  <cpu><numa>{cells}</numa></cpu>")
    wider = (NumaCell(0, VcpuMap([0, 1, 4, 5]), 1), NumaCell(1, VcpuMap([2, 3]), 1))
    assert "<cell id='0' cpus='0-1,4-5' memory='1'/><cell id='1' memory='1' cpus=\"2-3\"/>" in changed(
        base, vcpus=states("bb----"), numa=wider
    )
    fewer = (NumaCell(0, VcpuMap([0, 1]), 1), NumaCell(1, VcpuMap(), 1))
    assert "<cell id='0' cpus='0-1' memory='1'/><cell id='1' memory='1'/>" in changed(
        base, vcpus=states("bb"), numa=fewer
    )


def test_a_cell_with_a_comma_at_the_end_as_libvirt_takes_it_does_not_keep_a_change_away() -> None:
    cells = "<cell id='0' cpus='0-1,' memory='1'/><cell id='1' memory='1' cpus='2-3,'/>"
    base = document(VCPU, f"  <cpu><numa>{cells}</numa></cpu>")
    assert cells in changed(base, vcpus=states("bbb-"))
    moved = (NumaCell(0, VcpuMap([0, 1, 2]), 1), NumaCell(1, VcpuMap([3]), 1))
    assert "<cell id='0' cpus='0-2' memory='1'/><cell id='1' memory='1' cpus='3'/>" in changed(base, numa=moved)


ZEROS = "0" * 5000


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("current='2'", f"current='{ZEROS}2'"),
        ("vcpu id='1'", f"vcpu id='{ZEROS}1'"),
        ("vcpupin vcpu='1'", f"vcpupin vcpu='{ZEROS}1'"),
        ("cell id='0'", f"cell id='{ZEROS}'"),
    ],
)
def test_a_number_has_as_many_zeros_as_libvirt_takes(before: str, after: str) -> None:
    pins = "  <cputune><vcpupin vcpu='1' cpuset='3'/></cputune>"
    cells = "  <cpu><numa><cell id='0' cpus='0-3' memory='1'/></numa></cpu>"
    count = "  <vcpu placement='static' current='2'>4</vcpu>"
    base = document(count, pins, cells) if "current" in before else document(count, ROWS, pins, cells)
    odd = base.replace(before.encode(), after.encode())
    assert odd != base
    assert changed(odd, vcpus=states("bbb-"), pins={1: VcpuMap([2]), 2: VcpuMap([3])})


def test_cells_are_not_added_or_removed() -> None:
    base = document(VCPU)
    with pytest.raises(DomainXmlError, match="cells are not added"):
        update(base, replace(parse(base), numa=(NumaCell(0, VcpuMap(range(4)), 1),)))


AUTO = "  <numatune><memory mode='strict' placement='auto'/></numatune>"


@pytest.mark.parametrize("vcpu", ["<vcpu>4</vcpu>", "<vcpu placement='static'>4</vcpu>"])
def test_a_placement_that_libvirt_derives_is_said_once_something_is_pinned(vcpu: str) -> None:
    base = document(f"  {vcpu}", AUTO)
    assert parse(base).placement == "auto"
    pinned = update(base, replace(parse(base), pins={0: VcpuMap([1])}))
    assert b"<vcpu placement='auto'>4</vcpu>" in pinned
    assert parse(pinned).placement == "auto"
    assert parse(pinned).pins == {0: VcpuMap([1])}
    assert update(base, parse(base)) == base


def test_the_last_pin_leaves_and_libvirt_derives_the_placement_again() -> None:
    pin = "  <cputune><vcpupin vcpu='0' cpuset='1'/></cputune>"
    base = document("  <vcpu placement='static'>4</vcpu>", pin, AUTO)
    assert parse(base).placement == "static"
    assert parse(update(base, replace(parse(base), pins={}))).placement == "auto"


def test_a_placement_against_that_of_the_memory_is_refused() -> None:
    base = document("  <vcpu>4</vcpu>", AUTO)
    with pytest.raises(DomainXmlError, match="libvirt would read something else than was asked for: placement"):
        update(base, replace(parse(base), placement="static"))
    with pytest.raises(DomainXmlError, match="placement"):
        update(base, replace(parse(base), cpuset=VcpuMap([1])))
    asked = replace(parse(base), cpuset=VcpuMap([1]), placement="static")
    assert parse(update(base, asked)) == asked
