"""A document is told apart, or refused with its line, whatever somebody put into it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.domainxml import NAMESPACE, Metadata, parse, read_identity, render, validate
from qmpvcpu.domainxml.patch import with_uuid
from qmpvcpu.errors import DomainRuleError, DomainXmlError
from tests.domainxml.examples import Q35, layout_of

LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
HOSTILE = {
    "billion laughs": f'<!DOCTYPE d [<!ENTITY l0 "ha">{LAUGHS}]><domain><name>&l9;</name></domain>',
    "a local file": '<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/passwd">]><domain><name>&e;</name></domain>',
    "a network document type": '<!DOCTYPE domain SYSTEM "http://127.0.0.1:9/d.dtd"><domain><name>a</name></domain>',
    "a parameter entity": '<!DOCTYPE d [<!ENTITY % p SYSTEM "http://127.0.0.1:9/">%p;]><domain><name>a</name></domain>',
    "laughs in an attribute": f'<!DOCTYPE d [<!ENTITY l0 "ha">{LAUGHS}]><domain a="&l9;"><name>a</name></domain>',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_document_is_refused_whatever_its_encoding(case: str, encoding: str) -> None:
    with pytest.raises(DomainXmlError):
        read_identity(HOSTILE[case].encode(encoding))


def test_an_encoding_that_hides_a_document_type_is_not_believed() -> None:
    hidden = '<?xml version="1.0" encoding="utf-7"?>+ADwAIQ-DOCTYPE d+AD4-<domain><name>a</name></domain>'
    with pytest.raises(DomainXmlError):
        read_identity(hidden.encode())


def test_an_error_tells_the_line() -> None:
    with pytest.raises(DomainXmlError, match="line 3") as refused:
        read_identity(b"\n\n<!DOCTYPE d><domain/>")
    assert refused.value.line == 3
    with pytest.raises(DomainXmlError) as torn:
        read_identity(b"<domain>\n<name>a</nme>\n</domain>")
    assert torn.value.line == 2


def test_a_document_torn_anywhere_is_refused() -> None:
    layout = layout_of(4, [0, 2], boot=1)
    whole = render(layout, metadata=Metadata().with_layout(layout)).rstrip()
    for cut in range(len(whole)):
        with pytest.raises(DomainXmlError):
            read_identity(whole[:cut])


def test_nesting_without_end_is_refused_and_does_not_cost_the_process() -> None:
    with pytest.raises(DomainXmlError):
        read_identity(b"<domain><name>a</name>" + b"<a>" * 100_000)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(DomainXmlError):
        read_identity(data)


@pytest.mark.parametrize(
    "uuid", ["", "<uuid/>", "<uuid></uuid>", "<uuid><!-- none --></uuid>", "<uuid/><uuid>x</uuid>"]
)
def test_an_empty_uuid_is_none_to_every_reader(uuid: str) -> None:
    xml = f"<domain type='kvm'><name>a</name>{uuid}</domain>".encode()
    assert (read_identity(xml).uuid, parse(xml).uuid, validate(xml)) == (None, None, ())


@pytest.mark.parametrize(
    "wrong", ["<name/>", "", "<name>a/b</name>", "<name>a&#10;b</name>", "<name>a</name><uuid> </uuid>"]
)
def test_every_reader_refuses_a_name_or_uuid_with_the_same_words(wrong: str) -> None:
    xml = f"<domain type='kvm'>\n{wrong}</domain>".encode()
    said = []
    for read in (read_identity, parse):
        with pytest.raises(DomainRuleError) as refused:
            read(xml)
        said.append(str(refused.value))
    assert said[0] == said[1] == str(validate(xml)[0])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("<network/>", "not a <domain>"),
        ("<domain/>", "a domain has a name"),
        ("<domain><name/></domain>", "a domain has a name"),
        ("<domain><name>a/b</name></domain>", "no / and no line break"),
        ("<domain><name>a\nb</name></domain>", "no / and no line break"),
        ("<domain><name>a</name><uuid>1234</uuid></domain>", "a UUID is 32 hexadecimal digits"),
        ('<domain xmlns="urn:x"><name>a</name></domain>', "a <domain> of the namespace urn:x, not a <domain>"),
        ("<domain><name>&e;</name></domain>", "not well-formed"),
    ],
)
def test_what_is_no_domain_of_anybody_is_refused(body: str, told: str) -> None:
    with pytest.raises(DomainXmlError, match=told):
        read_identity(body.encode())


@pytest.mark.parametrize(
    "record",
    [
        "<q:record xmlns:q='{}'/>",
        "<q:record xmlns:q='{}' generation='-1'/>",
        "<q:record xmlns:q='{}' generation='1' made-up-uuid='x'/>",
        "<q:record xmlns:q='{}' generation='1'><q:instance/></q:record>",
        "<q:record xmlns:q='{}' generation='1'><q:instance host-tid='1' start-ticks='x'/></q:record>",
        "<q:record xmlns:q='{}' generation='1'><q:pending vcpus='1-'/></q:record>",
        "<q:record xmlns:q='{}' generation='1'><q:device id='a'/></q:record>",
        "<q:record xmlns:q='{}' generation='" + "9" * 5000 + "'/>",
    ],
)
def test_damaged_metadata_of_ours_is_refused_not_guessed(record: str) -> None:
    document = f"<domain><name>a</name><metadata>{record.format(NAMESPACE)}</metadata></domain>"
    with pytest.raises(DomainXmlError, match="our metadata is damaged"):
        read_identity(document.encode())


def test_a_document_without_our_element_is_nobodys_record() -> None:
    found = read_identity(b"<?xml version='1.0'?><!-- mine --><domain type='kvm'><name>a</name></domain>")
    assert (found.name, found.uuid, found.metadata) == ("a", None, None)


NEWER = {
    "a later format": f"<q:record xmlns:q='{NAMESPACE[:-1]}2'/>",
    "a much later format": f"<q:history xmlns:q='{NAMESPACE[:-1]}10'/>",
    "another element of ours": f"<q:history xmlns:q='{NAMESPACE}'/>",
    "an attribute": f"<q:record xmlns:q='{NAMESPACE}' generation='1' host='h'/>",
    "an element": f"<q:record xmlns:q='{NAMESPACE}' generation='1'><q:pins/></q:record>",
    "an element of a later format": f"<q:record xmlns:q='{NAMESPACE}'><p:pins xmlns:p='{NAMESPACE}0'/></q:record>",
    "an attribute further down": f"<q:record xmlns:q='{NAMESPACE}' generation='1'><q:pending since='1'/></q:record>",
    "an element further down": f"<q:record xmlns:q='{NAMESPACE}'><q:pending vcpus=''><q:x/></q:pending></q:record>",
}


@pytest.mark.parametrize("case", NEWER)
def test_what_only_a_newer_version_can_have_written_is_refused_and_said_to_be_so(case: str) -> None:
    document = f"<domain><name>a</name>\n<metadata>{NEWER[case]}</metadata></domain>"
    with pytest.raises(DomainXmlError, match="line 2: written by a newer version"):
        read_identity(document.encode())


def test_a_uuid_is_told_in_one_form() -> None:
    found = read_identity(b"<domain><name>a</name><uuid> 6F9E0A3E6A2E4A8D9A380F6F4F8F4B8A\n</uuid></domain>")
    assert found.uuid == "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a"


SPELLINGS = {
    "": None,
    "6F9E0A3E6A2E4A8D9A380F6F4F8F4B8A": "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a",
    " 6f9e-0a3e6a2e4a8d9a38-0f6f4f8f4b-8a ": "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a",
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_uuid_is_read_alike_everywhere(text: str) -> None:
    document = f"<domain type='kvm'><name>a</name><uuid>{text}</uuid><vcpu>2</vcpu></domain>".encode()
    assert read_identity(document).uuid == parse(document).uuid == SPELLINGS[text]
    given = "c7a5fdbd-cdaf-9455-926a-d65c16db1809"
    assert parse(with_uuid(document, given)).uuid == (SPELLINGS[text] or given)
    assert (with_uuid(document, given) == document) == (SPELLINGS[text] is not None)


def test_elements_that_we_never_write_are_named() -> None:
    document = b"""<domain><name>a</name><cputune><shares/></cputune><metadata><x:y xmlns:x='urn:x'/></metadata>
      <devices><emulator>/bin/qemu</emulator><!-- two --><disk/><disk/></devices></domain>"""
    assert read_identity(document).foreign == ("shares", "{urn:x}y", "!--", "disk")


def test_the_devices_that_keep_libvirt_off_a_missing_pci_bus_are_ours() -> None:
    layout = replace(layout_of(1, [0], boot=1), vm=replace(Q35, machine="microvm"))
    document = render(layout)
    assert document.count(b"model='none'") == 2
    assert read_identity(document).foreign == ()
    virtio = document.replace(b"model='none'", b"model='virtio'")
    assert read_identity(virtio).foreign == ("controller", "memballoon")
