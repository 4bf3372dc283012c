"""The diagrams of the manual show what they are drawn from."""

import pytest

from tests.docs.blocks import ROOT
from tests.docs.diagrams import IMAGES, SEQUENCES, all_drawings, evidence_table, recorded


@pytest.mark.parametrize("file", all_drawings())
def test_a_diagram_is_what_it_is_drawn_from(file: str) -> None:
    drawn = (IMAGES / file).read_text()
    assert drawn == str(all_drawings()[file]), "draw it anew: python -m tests.docs.diagrams"


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_is_what_was_recorded(name: str) -> None:
    sequence = SEQUENCES[name]
    assert [said.wire for said in sequence.said if said.wire] == recorded(sequence)


def test_the_table_of_a_removal_is_the_engines() -> None:
    assert evidence_table() in (ROOT / "docs" / "evidence.md").read_text()
