"""docs/security.md: each thing that somebody could do has a test that shows what holds against it."""

import ast
import re

import pytest

from tests.docs.blocks import ROOT, syntax_tree

PAGE = (ROOT / "docs" / "security.md").read_text()
CITED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
# The tables with the head: could, what holds, shown by.
ROWS = [
    row
    for table in re.findall(r"^\| (?:it|they) could \|.*\n\|[- |]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    for row in table.splitlines()
]


@pytest.mark.parametrize(("file", "name"), CITED, ids="::".join)
def test_a_test_that_the_page_names_is_there(file: str, name: str) -> None:
    names = {node.name for node in ast.walk(syntax_tree((ROOT / file).read_text())) if hasattr(node, "name")}
    assert name in names


def test_every_row_names_a_test() -> None:
    assert len(ROWS) > 15
    assert [row for row in ROWS if "`tests/" not in row.rsplit(" | ", 1)[-1]] == []


def test_the_page_names_tests_in_this_form_only() -> None:
    assert len(re.findall(r"`tests/", PAGE)) == len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", PAGE))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_page_is_found(page: str) -> None:
    assert re.search(r"\]\((?:docs/)?security\.md\)", (ROOT / page).read_text())
