"""Each rule of libvirt's, broken by a document that breaks no other, is named with its place."""

import json

import pytest

from qmpvcpu.domainxml import parse, validate
from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
from qmpvcpu.errors import DomainRuleError, DomainXmlError
from tests.domainxml.broken import BROKEN, PARTS, document, rows


@pytest.mark.parametrize("wrong", BROKEN)
def test_a_broken_rule_is_named_with_its_place(wrong: str) -> None:
    case = BROKEN[wrong]
    errors = validate(case.xml)
    found = [(each.rule, each.element, each.attribute, each.value, each.line, each.stage) for each in errors]
    assert found == [(case.rule, case.element, case.attribute, case.value, case.line, case.stage)]


@pytest.mark.parametrize("wrong", [name for name, case in BROKEN.items() if case.stage is RuleStage.DEFINE])
def test_a_document_that_libvirt_would_not_define_is_not_parsed(wrong: str) -> None:
    case = BROKEN[wrong]
    with pytest.raises(DomainRuleError) as refused:
        parse(case.xml)
    assert (refused.value.rule, refused.value.line) == (case.rule, case.line)


@pytest.mark.parametrize("wrong", [name for name, case in BROKEN.items() if case.stage is RuleStage.START])
def test_a_document_that_libvirt_would_only_not_start_is_parsed(wrong: str) -> None:
    assert parse(BROKEN[wrong].xml).name == "broken"


@pytest.mark.parametrize("wrong", BROKEN)
def test_the_message_tells_line_element_attribute_value_rule_and_what_libvirt_says(wrong: str) -> None:
    case = BROKEN[wrong]
    (error,) = validate(case.xml)
    message = str(error)
    assert message.startswith(f"line {case.line}: <{case.element}>")
    assert case.attribute is None or f"> {case.attribute}" in message
    assert case.value is None or json.dumps(case.value) in message
    assert case.rule.value in message
    assert f"libvirt at {case.stage.value}: {error.libvirt_says}" in message


def test_every_rule_has_a_document_that_breaks_it() -> None:
    assert {case.rule for case in BROKEN.values()} == set(DomainRule)


def test_the_document_that_all_of_these_differ_from_breaks_none() -> None:
    assert validate(document()) == ()


def test_all_broken_rules_are_told_in_the_order_in_which_libvirt_comes_upon_them() -> None:
    xml = document(
        vcpu="<vcpu current='x' cpuset=''>4</vcpu>",
        vcpus=rows("enabled='yes' order='2'", "enabled='no' hotpluggable='no'", "enabled='yes' order='9'"),
        cputune="<cputune><period>1</period><vcpupin vcpu='0'/></cputune>",
        cpu="<cpu mode='any'><topology sockets='1' cores='1' threads='1'/></cpu>",
    )
    assert [each.rule for each in validate(xml)] == [
        DomainRule.NOT_A_NUMBER,
        DomainRule.CPUSET_UNREADABLE,
        DomainRule.PIN_WITHOUT_CPUSET,
        DomainRule.NOT_A_CHOICE,
        DomainRule.VCPU_0_NOT_FIRST,
        DomainRule.STARTED_WITH_DESCENDING,
        DomainRule.OFF_NOT_HOTPLUGGABLE,
        DomainRule.TOPOLOGY_PRODUCT,
        DomainRule.TUNE_OUT_OF_RANGE,
    ]


def test_a_part_that_cannot_be_read_is_not_held_against_the_others() -> None:
    xml = document(
        vcpu="<vcpu>x</vcpu>", vcpus=rows("enabled='no'"), cpu="<cpu><numa><cell memory='x'/></numa></cpu>"
    )
    assert [each.rule for each in validate(xml)] == [DomainRule.COUNT_NOT_A_NUMBER, DomainRule.MEMORY_NOT_A_NUMBER]


@pytest.mark.parametrize(
    ("machine", "limit"),
    [
        ("pc", 255),
        ("pc-i440fx-2.4", 255),
        ("pc-i440fx-10.0", 255),
        ("pc-q35-2.7", 255),
        ("pc-q35-2.8", 288),
        ("pc-q35-4.0.1", 288),
        ("pc-q35-8.0", 288),
        ("pc-q35-8.1", 1024),
        ("pc-q35-9.0", 4096),
        ("pc-q35-10.0", 4096),
        ("q35", 4096),
        ("isapc", 1),
        ("microvm", 288),
        ("s390-ccw-virtio-10.0", 248),
    ],
)
def test_the_highest_number_of_vcpus_is_known_by_the_machine_type(machine: str, limit: int) -> None:
    def rules(count: int) -> list[DomainRule]:
        os = f"<os><type machine='{machine}'>hvm</type></os>"
        return [each.rule for each in validate(document(vcpu=f"<vcpu>{count}</vcpu>", os=os))]

    assert rules(limit) == []
    assert rules(limit + 1) == [DomainRule.MACHINE_LIMIT]


@pytest.mark.parametrize("machine", ["pc-q35-rhel9.2.0", "virt-10.0", "none-such", ""])
def test_nothing_is_held_against_a_machine_type_whose_limit_is_not_known(machine: str) -> None:
    os = f"<os><type arch='riscv64' machine='{machine}'>hvm</type></os>"
    assert validate(document(vcpu="<vcpu>16384</vcpu>", os=os)) == ()


def test_more_than_255_vcpus_are_taken_with_eim() -> None:
    devices = "<devices><iommu model='intel'><driver intremap='on' eim='on'/></iommu></devices>"
    assert validate(document(vcpu="<vcpu>288</vcpu>", rest=devices)) == ()
    microvm = "<os><type arch='x86_64' machine='microvm'>hvm</type></os>"
    (error,) = validate(document(vcpu="<vcpu>288</vcpu>", rest=devices, os=microvm))
    assert "only supported on q35" in error.libvirt_says


def test_whole_cores_of_pseries_are_taken() -> None:
    parts = {
        "os": "<os><type arch='ppc64le' machine='pseries'>hvm</type></os>",
        "cpu": "<cpu><topology sockets='1' cores='2' threads='4'/></cpu>",
    }
    on = ["enabled='yes' hotpluggable='no' order='1'"] * 4
    late = ["enabled='yes' hotpluggable='yes' order='2'"] * 4
    assert validate(document(vcpu="<vcpu current='4'>8</vcpu>", **parts)) == ()
    assert validate(document(vcpu="<vcpu>8</vcpu>", vcpus=rows(*on, *late), **parts)) == ()


def test_a_document_without_a_domain_is_no_broken_rule_but_an_error() -> None:
    with pytest.raises(DomainXmlError, match="a <network>, not a <domain>") as refused:
        validate(b"<network/>")
    assert not isinstance(refused.value, DomainRuleError)


def test_the_parts_stand_on_the_lines_that_the_table_counts_them_on() -> None:
    assert document().decode().split("\n")[: len(PARTS)] == list(PARTS.values())


def test_libvirt_counts_a_topology_again_after_the_other_rules_of_the_machine() -> None:
    cpu = "<cpu><topology sockets='{}' cores='1' threads='4'/></cpu>"
    too_many = {"vcpu": "<vcpu>256</vcpu>", "cputune": "<cputune><period>1</period></cputune>"}
    rules = [DomainRule.TOPOLOGY_PRODUCT, DomainRule.EIM_MISSING, DomainRule.TUNE_OUT_OF_RANGE]
    assert [each.rule for each in validate(document(cpu=cpu.format(3), **too_many))] == rules
    rules[:2] = reversed(rules[:2])
    assert [each.rule for each in validate(document(cpu=cpu.format(2**32 - 1), **too_many))] == rules
