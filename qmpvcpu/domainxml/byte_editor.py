"""Edits to the bytes of a document: what is not edited stays as it was written."""

import re
from collections.abc import Mapping, Sequence

from lxml import etree

from qmpvcpu.domainxml.safe_xml import Span, find_spans
from qmpvcpu.domainxml.writer import Node, write

_UNIT = b"  "
_NAME = re.compile(rb"<[^\s/>]+")
_ATTRIBUTE = re.compile(rb"""\s+([^\s=]+)\s*=\s*("[^"]*"|'[^']*')""")
_NUMBER = re.compile(rb"\s*\+?([0-9]+)\s*")
_NO_TEXT = re.compile(rb"<!--.*?-->|<\?.*?\?>", re.DOTALL)
_BREAK = re.compile(rb"\r\n|\r|\n")
# Comments at the end of a line belong to what is before them. They are looked for once per row, thousands of times,
# which a hostile document could make expensive: hence the bounds.
_REST_OF_LINE = re.compile(rb"(?:[ \t]{0,99}<!--(?:(?!--)[^\r\n]){0,500}+-->){0,9}+[ \t]{0,99}(?=[\r\n])")
_BLANK_REST = re.compile(rb"[ \t]*(?=[\r\n])")
# Each new line copies the indentation; nobody indents by more.
_MOST_BLANKS = 200


class Editor:
    """Edits to one document, all made at once by ``result``.

    New elements are written as libvirt writes them (single quotes, two blanks a level), on lines of their own where
    their neighbours are; they take over the neighbours' indentation and line ends.

    Args:
        xml: The document.
        root: Its tree, from ``parse_safely``.

    Attributes:
        root: As given; never changed.
    """

    def __init__(self, xml: bytes, root: etree._Element) -> None:
        self.root = root
        self._xml = xml
        self._spans: dict[etree._Element, Span] = dict(zip(self.root.iter("*"), find_spans(xml), strict=True))
        self._edits: list[tuple[int, int, bytes]] = []
        self._inside: dict[etree._Element, list[Node]] = {}  # new children of elements that have none
        self._margins: dict[etree._Element, bytes] = {}  # each found once: a line can be as long as the document
        self._anchors: dict[tuple[etree._Element, tuple[str, ...]], etree._Element | None] = {}
        self._unit = self._find_unit()

    def result(self) -> bytes:
        """Return the document with all edits made."""
        for parent, nodes in self._inside.items():
            self._fill(parent, nodes)
        self._inside.clear()
        pieces = []
        at = 0
        for start, end, text in sorted(self._edits, key=lambda edit: edit[:2]):
            pieces += [self._xml[at:start], text]
            at = end
        return b"".join([*pieces, self._xml[at:]])

    def set_attributes(
        self, element: etree._Element, changes: Mapping[str, str | None], *, order: Sequence[str]
    ) -> None:
        """Give attributes of *element* new values, or remove them (None); at most once for each element.

        Args:
            element: Of this document.
            changes: New values, which need no escaping, by name.
            order: libvirt's order of the names, which says where a new one goes.
        """
        span = self._spans[element]
        tag = self._xml[span.start : span.content]
        name = _NAME.match(tag)
        pieces = [(b"", tag[: name.end() if name else 0])]
        quote = b"'"
        at = len(pieces[0][1])
        while found := _ATTRIBUTE.match(tag, at):
            attribute, value = found[1], found[2]
            quote, key, at = value[:1], attribute.decode(), found.end()
            given = changes.get(key, "")
            if key not in changes:
                pieces.append((attribute, found[0]))
            elif given is not None:
                pieces.append((attribute, found[0][: -len(value)] + quote + given.encode() + quote))
        there = {attribute for attribute, _ in pieces}
        for key, value in changes.items():
            if value is not None and key.encode() not in there:
                before = {b"", *(each.encode() for each in order[: order.index(key)])}
                place = max(index for index, (attribute, _) in enumerate(pieces) if attribute in before)
                pieces.insert(place + 1, (key.encode(), b" " + key.encode() + b"=" + quote + value.encode() + quote))
        self._put(span.start, span.content, b"".join(text for _, text in pieces) + tag[at:])

    def set_number(self, element: etree._Element, number: int) -> None:
        """Replace the number that is the text of *element*."""
        span = self._spans[element]
        content = self._xml[span.content : span.close]
        text = _NO_TEXT.sub(lambda comment: b" " * len(comment[0]), content)
        found = _NUMBER.fullmatch(text)
        start, end = found.span(1) if found else (0, len(content))
        self._put(span.content + start, span.content + end, b"%d" % number)

    def remove(self, element: etree._Element) -> None:
        """Remove *element*, and its line if nothing else is on it."""
        span = self._spans[element]
        margin = self._margin(element)
        rest = _BLANK_REST.match(self._xml, span.end)
        if margin and rest:
            self._put(span.start - len(margin), rest.end(), b"")
        else:
            self._put(span.start, span.end, b"")

    def replace(self, element: etree._Element, node: Node) -> None:
        """Replace *element* by *node*."""
        span = self._spans[element]
        margin = self._margin(element)
        self._put(span.start, span.end, self._text(node, margin)[len(margin) :])

    def rewrite(self, element: etree._Element, before: str, after: str) -> bool:
        """Replace the bytes *before* of *element* by *after*; return False if it is written in another way."""
        span = self._spans[element]
        exact = self._xml[span.start : span.end] == before.encode()
        if exact:
            self._put(span.start, span.end, after.encode())
        return exact

    def insert_after(self, element: etree._Element, node: Node | str) -> None:
        """Insert *node* after *element* and the comments on its line; repeated calls keep their order."""
        end = self._spans[element].end
        if element not in self._margins:
            self._margins[element] = self._margin(element) or self._margin_of_next_line(end)
        self._insert(end, node, self._margins[element])

    def insert(self, parent: etree._Element, node: Node, *, after: Sequence[str]) -> None:
        """Insert *node* into *parent*, after the last child with the latest name in *after*, or else first."""
        anchor = self._anchor(parent, tuple(after))
        if anchor is not None:
            self.insert_after(anchor, node)
            return
        first = next(parent.iterchildren("*"), None)
        if first is None:
            self._inside.setdefault(parent, []).append(node)
        else:
            self._insert(self._spans[parent].content, node, self._margin(first))

    def _anchor(self, parent: etree._Element, after: tuple[str, ...]) -> etree._Element | None:
        # Found once: thousands of pins may go after one element that has thousands of children.
        key = (parent, after)
        if key not in self._anchors:
            found = (next(parent.iterchildren(tag, reversed=True), None) for tag in reversed(after))
            self._anchors[key] = next((each for each in found if each is not None), None)
        return self._anchors[key]

    def _insert(self, at: int, node: Node | str, margin: bytes) -> None:
        rest = _REST_OF_LINE.match(self._xml, at) if margin else None
        place = rest.end() if rest else at
        self._put(place, place, self._text(node, margin))

    def _fill(self, parent: etree._Element, nodes: list[Node]) -> None:
        span = self._spans[parent]
        outer = self._margin(parent)
        inner = outer + self._unit if outer else b""
        text = b"".join(self._text(node, inner) for node in nodes)
        if span.is_empty_tag:
            tag = self._xml[span.start : span.content]
            name = _NAME.match(tag)
            closing = b"</" + (name[0][1:] if name else b"") + b">"
            self._put(span.start, span.end, tag[:-2].rstrip() + b">" + text + outer + closing)
            return
        behind = span.content + len(self._xml[span.content : span.close].rstrip())
        ends_line = _BREAK.search(self._xml, behind, span.close)
        self._put(behind, behind if ends_line else span.close, text + (b"" if ends_line else outer))

    def _put(self, start: int, end: int, text: bytes) -> None:
        self._edits.append((start, end, text))

    def _text(self, node: Node | str, margin: bytes) -> bytes:
        """Return *node* as text, each line after a line break and its indentation if there is a *margin*."""
        lines = []
        whole = node.encode() if isinstance(node, str) else write(node).removesuffix(b"\n")
        for line in whole.split(b"\n"):
            text = line.lstrip(b" ")
            depth = (len(line) - len(text)) // len(_UNIT)
            lines.append((margin + self._unit * depth if margin else b"") + text)
        return b"".join(lines)

    def _margin(self, element: etree._Element) -> bytes:
        """Return the line break and the blanks before *element*; empty if it is not the first on its line."""
        end = start = self._spans[element].start
        while end - start <= _MOST_BLANKS and self._xml[start - 1 : start] in {b" ", b"\t"}:
            start -= 1
        line_break = self._xml[max(start - 2, 0) : start]
        if not line_break.endswith((b"\n", b"\r")):
            return b""
        return self._xml[start - (2 if line_break == b"\r\n" else 1) : end]

    def _margin_of_next_line(self, at: int) -> bytes:
        """Return the line break after *at* and the indentation of its line; empty if more follows on the line."""
        rest = _REST_OF_LINE.match(self._xml, at)
        ends = rest and _BREAK.match(self._xml, rest.end())
        if not ends:
            return b""
        begins = max(self._xml.rfind(b"\n", 0, at), self._xml.rfind(b"\r", 0, at)) + 1
        line = self._xml[begins:at]
        return ends[0] + line[: min(len(line) - len(line.lstrip(b" \t")), _MOST_BLANKS)]

    def _find_unit(self) -> bytes:
        first = next(self.root.iterchildren("*"), None)
        margin = b"" if first is None else self._margin(first)
        return margin.lstrip(b"\r\n") or _UNIT
