"""Where the elements of a document are in its bytes."""

import re
from typing import NamedTuple

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
