"""Our own element, in a document of somebody else's."""

import pytest

from qmpvcpu.domainxml import Metadata, parse, update
from qmpvcpu.errors import DomainXmlError
from tests.domainxml.documents import VCPU, document


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("  <title>a</title>", "  <title>a</title>\n  <metadata>\n    OURS\n  </metadata>"),
        ("  <metadata/>", "  <metadata>\n    OURS\n  </metadata>"),
        ("  <metadata></metadata>", "  <metadata>\n    OURS\n  </metadata>"),
        ("  <metadata>\n  </metadata>", "  <metadata>\n    OURS\n  </metadata>"),
        ("  <metadata><!-- none --></metadata>", "  <metadata><!-- none -->\n    OURS\n  </metadata>"),
        ("  <metadata><a/></metadata>", "  <metadata><a/>OURS</metadata>"),
        ("  <metadata>\n    <a/>\n  </metadata>", "  <metadata>\n    <a/>\n    OURS\n  </metadata>"),
    ],
)
def test_our_element_is_put_where_libvirt_keeps_it(before: str, expected: str) -> None:
    base = document(before, VCPU)
    metadata = Metadata(generation=5)
    result = update(base, parse(base), metadata=metadata)
    ours = '<qmpvcpu:record xmlns:qmpvcpu="urn:qmpvcpu:record:1" generation="5"/>'
    assert result.decode() == base.decode().replace(before, expected.replace("OURS", ours))
    assert update(result, parse(result), metadata=metadata) == result
    again = update(result, parse(result), metadata=Metadata(generation=6))
    assert again == result.replace(b'"5"', b'"6"')
    assert update(again, parse(again)) == again


def test_our_element_in_other_words_stays() -> None:
    ours = "<x:record generation='5' xmlns:x='urn:qmpvcpu:record:1'><!-- kept --></x:record>"
    base = document(f"  <metadata>{ours}</metadata>", VCPU)
    assert update(base, parse(base), metadata=Metadata(generation=5)) == base


def test_our_element_of_a_newer_version_or_damaged_is_not_replaced() -> None:
    for ours in (
        "<x:record xmlns:x='urn:qmpvcpu:record:2'/>",
        "<x:record xmlns:x='urn:qmpvcpu:record:1' generation='x'/>",
    ):
        base = document(f"  <metadata>{ours}</metadata>", VCPU)
        with pytest.raises(DomainXmlError):
            update(base, parse(base), metadata=Metadata())
