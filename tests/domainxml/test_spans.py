"""Where elements are: held to expat, which knows nothing of ours, on every kind of markup."""

from xml.parsers import expat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.domainxml.safe_xml import Span, find_spans, parse_safely

DOCUMENTS = {
    "one empty element": b"<a/>",
    "one element without content": b"<a></a>",
    "blanks in tags": b"<a  b = 'c'\n\t><d /><e\r\n/></a  \n>",
    "greater-than in values": b"""<a b='>' c="/>"><d e="'>'" f='">"'/></a>""",
    "greater-than in text": b"<a>></a>",
    "markup in a comment": b"<a><!-- <b> </a> ' \" --><c/><!----></a>",
    "markup in CDATA": b"<a><![CDATA[<b> </a> ]] > ' ]]><c/></a>",
    "processing instructions": b"<?xml version='1.0'?><?a <b> ' ?><a><?c </a> ?><d/></a><?e?>",
    "entities": b"<a b='&lt;&gt;&apos;&#39;'>&amp;&#x3e;<c/></a>",
    "line ends of every kind": b"<a>\r\n  <b/>\r  <c/>\n</a>\r\n",
    "a byte order mark": b"\xef\xbb\xbf<a><b/></a>",
    "a declaration": b'<?xml version="1.0" encoding="UTF-8" standalone=\'yes\'?>\n<a><b/></a>',
    "not only ASCII": "<\u00e4 \u00f6='\U0001f600'>\u20ac<\u00fc/></\u00e4>".encode(),
    "namespaces": b"<a xmlns:q='urn:q'><q:b q:c='d'><q:e/></q:b></a>",
    "apostrophes in text": b"<a>it's <b/> isn't \"<c/></a>",
    "comments around it": b"<!-- <a> -->\n<a/>\n<!-- </a> -->",
    "an end tag at once after an empty one": b"<a><b/></a>",
    "siblings of one name": b"<a><a/><a><a/></a></a>",
}


def spans_by_expat(xml: bytes) -> list[tuple[int, int]]:
    """Return where each element begins and its end tag begins (or, without one, it ends), as expat tells it."""
    parser = expat.ParserCreate()
    found: list[tuple[int, int]] = []
    open_: list[int] = []

    def start(_name: str, _attributes: dict[str, str]) -> None:
        open_.append(len(found))
        found.append((parser.CurrentByteIndex, -1))

    def end(_name: str) -> None:
        place = open_.pop()
        found[place] = found[place][0], parser.CurrentByteIndex

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.Parse(xml, True)  # noqa: FBT003 -- expat has it by place only
    return found


def assert_expat_agrees(xml: bytes) -> None:
    spans = find_spans(xml)
    # Its places do not count a byte order mark.
    mark = len(xml) - len(xml.removeprefix(b"\xef\xbb\xbf"))
    assert [(span.start, span.close) for span in spans] == [
        (start + mark, end + mark) for start, end in spans_by_expat(xml[mark:])
    ]
    for span, element in zip(spans, parse_safely(xml).iter("*"), strict=True):
        name = str(element.tag).rpartition("}")[2].encode()
        assert xml[span.start : span.start + 1] == b"<"
        assert name in xml[span.start : span.content].split(b"=")[0]
        assert xml[span.content - 1 : span.content] == xml[span.end - 1 : span.end] == b">"
        assert span.is_empty_tag == (xml[span.content - 2 : span.content] == b"/>")


@pytest.mark.parametrize("case", DOCUMENTS)
def test_expat_agrees_on_where_elements_are(case: str) -> None:
    assert_expat_agrees(DOCUMENTS[case])


def test_an_element_with_content_is_told_from_one_without() -> None:
    assert find_spans(b"<a> <b/></a>") == [Span(0, 3, 8, 12), Span(4, 8, 8, 8)]
    assert [span.is_empty_tag for span in find_spans(b"<a><b/><c></c></a>")] == [False, True, False]


BLANK = st.sampled_from(["", " ", "\n  ", "\r\n\t", "\r"])
NAME = st.sampled_from(["a", "vcpu", "q:b", "\u00e4", "x-1"])
VALUE = st.sampled_from(["", "1", ">", "/", "/>", "&amp;", "&lt;!--", "--", "]]", "\u20ac", "="])
NOISE = st.sampled_from(
    [
        "",
        "text",
        "it's \"",
        "&lt;",
        "<!-- <a> -->",
        "<!--'-->",
        "<![CDATA[</a><b '>]]>",
        '<?x <a/> "?>',
        "\U0001f600",
        "--",
    ]
)


@st.composite
def elements(draw: st.DrawFn, depth: int = 3) -> str:
    name, blank = draw(NAME), draw(BLANK)
    attributes = ""
    for attribute in draw(st.lists(NAME, unique=True, max_size=2)):
        quote = draw(st.sampled_from("'\""))
        other = "'" if quote == '"' else '"'
        equals = draw(st.sampled_from(["=", " = ", "\n="]))
        attributes += (
            f"{draw(BLANK) or ' '}{attribute}{equals}{quote}{draw(VALUE)}{draw(st.sampled_from(['', other]))}{quote}"
        )
    children = draw(st.lists(elements(depth - 1), max_size=3)) if depth else []
    if not children and draw(st.booleans()):
        return f"<{name}{attributes}{blank}/>"
    content = draw(NOISE) + "".join(child + draw(NOISE) + draw(BLANK) for child in children)
    return f"<{name}{attributes}{blank}>{content}</{name}{draw(BLANK)}>"


@given(before=st.sampled_from(["", "\ufeff", "<?xml version='1.0'?>\n", "<!-- <r> -->"]), inside=elements())
def test_expat_agrees_on_any_document(before: str, inside: str) -> None:
    assert_expat_agrees(f"{before}<r xmlns:q='urn:q'>{inside}</r>\n<!-- </r> -->".encode())
