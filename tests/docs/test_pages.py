"""The pages are whole: every block is run, every link leads somewhere, what they list is all there is."""

import re
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, Block, blocks_of, claims, why_not_run
from tests.docs.session import Session

EVERY_BLOCK = [block for page in PAGES for block in blocks_of(page)]
AS_IT_STANDS = [page for page in PAGES if any(block.as_it_stands for block in blocks_of(page))]


@pytest.mark.parametrize("block", EVERY_BLOCK, ids=str)
def test_every_block_is_run(block: Block) -> None:
    assert why_not_run(block) == ""


def test_no_test_asks_for_a_block_that_is_not_there() -> None:
    there = {(block.page, block.name) for block in EVERY_BLOCK}
    assert [claim for claim in claims() if claim not in there] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_fence_of_a_page_is_overlooked(page: Path) -> None:
    fences = re.findall(r"^ *(?:```|~~~)", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks_of(page))


@pytest.mark.qemu
@pytest.mark.parametrize("page", AS_IT_STANDS, ids=lambda page: page.name)
async def test_a_page_does_what_it_shows(page: Path, tmp_path: Path) -> None:
    async with Session(tmp_path) as session:
        for block in blocks_of(page):
            if block.as_it_stands:
                await session.run(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
