"""The examples in the docstrings are run, at a prompt that knows their module."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import qmpvcpu
from tests.docs.session import Session

EXAMPLES = [
    found
    for each in pkgutil.walk_packages(qmpvcpu.__path__, "qmpvcpu.")
    if not each.name.endswith("__main__")
    for found in doctest.DocTestFinder().find(importlib.import_module(each.name))
    if found.examples
]


@pytest.mark.qemu
@pytest.mark.parametrize("found", EXAMPLES, ids=lambda found: found.name)
async def test_an_example_prints_what_it_shows(found: doctest.DocTest, tmp_path: Path) -> None:
    async with Session(tmp_path) as session:
        session.names.update(found.globs)
        await session.prompt(found.name, found.docstring or "")


def test_no_example_is_left_out() -> None:
    assert len(EXAMPLES) > 10
    skipped = [found.name for found in EXAMPLES for each in found.examples if each.options.get(doctest.SKIP)]
    assert skipped == []
