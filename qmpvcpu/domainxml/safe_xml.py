"""XML that nobody vouches for: read safely to elements, and where these are in its bytes."""

import re
from typing import NamedTuple

from lxml import etree

from qmpvcpu.errors import DomainXmlError

# What libvirt takes from a client (REMOTE_STRING_MAX), and ten times the document of 4096 vCPUs with a pin for each.
_MOST_BYTES = 4 * 1024 * 1024
# A row, a pin, a scheduler and a step for each of 16384 vCPUs take half of it.
_MOST_TAGS = 2**17
# It is a part of the name of each element and attribute, so that a long one costs its length as many times.
_LONG_NAMESPACE = re.compile(rb"""\sxmlns(?::[^\s=]{0,999})?\s*+=\s*+(?:"[^"]{257}|'[^']{257})""")


def parse_safely(xml: bytes) -> etree._Element:
    """Parse a document that anybody may have written.

    Nothing is fetched, no entity is expanded, nothing is included, no document type is accepted, and what is built is
    bounded: *xml* has at most 4 MiB, and 131,072 tags (comments and the like count too).

    Raises:
        DomainXmlError: Not well-formed (torn, empty, not UTF-8), too large, or with a document type; ``line`` says
            where.
    """
    if len(xml) > _MOST_BYTES:
        raise DomainXmlError(f"larger than {_MOST_BYTES} bytes, which is more than libvirt takes")
    if not xml.strip():
        raise DomainXmlError("the document is empty")
    try:
        xml.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DomainXmlError(f"not UTF-8 ({error.reason})", line=xml.count(b"\n", 0, error.start) + 1) from error
    # Refused before any parsing: entities, and with them every expansion attack, need a document type. Whatever
    # encoding the document claims, it is read as UTF-8, so that these bytes are the only way to spell one.
    doctype = xml.find(b"<!DOCTYPE")
    if doctype >= 0:
        raise DomainXmlError("a document type is not accepted", line=xml.count(b"\n", 0, doctype) + 1)
    if xml.count(b"<") > _MOST_TAGS:
        raise DomainXmlError(f"more than {_MOST_TAGS} tags, which no domain has")
    if found := _LONG_NAMESPACE.search(xml):
        line = xml.count(b"\n", 0, found.start()) + 1
        raise DomainXmlError("a namespace of more than 256 characters, which no domain has", line=line)
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_pis=True
    )
    try:
        return etree.fromstring(xml, parser)
    except etree.XMLSyntaxError as error:
        raise DomainXmlError(f"not well-formed: {error.msg}", line=error.lineno) from error


def line_of(element: etree._Element) -> int | None:
    """Return the line that *element* begins on, from 1, where known."""
    line = element.sourceline
    return line if isinstance(line, int) else None


def text_of(element: etree._Element) -> str:
    """Return all text in an element, as XPath's ``string()`` does."""
    return str(element.xpath("string()"))


# All that markup can be in a well-formed document without document type. What looks like markup inside a comment,
# CDATA or an attribute's value is none, and is passed over as a part of these. Nothing is ever tried twice, so that
# this takes linear time whatever the bytes are.
_MARKUP = re.compile(
    rb"""
    <!--.*?--> | <!\[CDATA\[.*?\]\]> | <\?.*?\?>
    | (?P<end></[^>]*+>)
    | (?P<start><(?:[^>"']++|"[^"]*+"|'[^']*+')*+>)
    """,
    re.DOTALL | re.VERBOSE,
)


class Span(NamedTuple):
    """The place of one element, in bytes from the beginning of the document; ends are exclusive.

    Attributes:
        start: Where its start tag begins.
        content: Where that tag ends: the content begins here.
        close: Where its end tag begins; where there is none (``<a/>``), as ``content``.
        end: Where it ends.
    """

    start: int
    content: int
    close: int
    end: int

    @property
    def is_empty_tag(self) -> bool:
        """True if it is written as ``<a/>``, without an end tag."""
        return self.close == self.end


def find_spans(xml: bytes) -> list[Span]:
    """Return where each element is, in document order.

    Args:
        xml: A document that ``parse_safely`` has accepted: well-formed UTF-8, no document type. Of any other, the
            result means nothing.

    Example:
        >>> find_spans(b"<a><b c='>'/></a>")
        [Span(start=0, content=3, close=13, end=17), Span(start=3, content=13, close=13, end=13)]
    """
    found: list[Span | None] = []
    open_: list[tuple[int, int, int]] = []  # its place among those found, start and content
    for markup in _MARKUP.finditer(xml):
        kind = markup.lastgroup
        start, end = markup.span()
        if kind == "start":
            if xml[end - 2] == ord("/"):
                found.append(Span(start, end, end, end))
            else:
                open_.append((len(found), start, end))
                found.append(None)
        elif kind == "end":
            place, begun, content = open_.pop()
            found[place] = Span(begun, content, start, end)
    return [span for span in found if span is not None]
