"""The page on libvirt lists the differences that the tests tolerate, and no others."""

import re
from pathlib import Path

from tests.libvirt.tolerated import FAULTS, NO_SUCH_COUNT, OF_PLACES, READING, REFUSALS, TOLERATED

PAGE = (Path(__file__).parents[2] / "docs" / "libvirt.md").read_text()


def rows(heading: str) -> list[tuple[str, ...]]:
    """The rows of the table under *heading*, without its head."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (found,) = [each for each in section if each.startswith(f"{heading}\n")]
    lines = [line for line in found.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def test_the_differences_on_purpose_are_those_that_the_twins_may_have() -> None:
    assert rows("Different on purpose") == [tuple(each) for each in (*TOLERATED, *OF_PLACES)]


def test_the_differences_of_what_is_read_are_those_that_the_comparison_may_have() -> None:
    assert [(what, why.replace("`", "")) for what, why in rows("Documents that are read")] == list(READING.items())


def test_the_refusals_are_those_that_the_twins_compare() -> None:
    listed = [(f"`{reason.name}`", text) for reason, text in REFUSALS.items()]
    listed += [("`UNKNOWN_VCPU` (a count)", text) for text in NO_SUCH_COUNT]
    assert rows("Refused alike") == listed


def test_the_faults_are_those_that_are_shown() -> None:
    assert rows("Where libvirt is wrong") == [each[:-1] for each in FAULTS]
    shown = (Path(__file__).parents[1] / "libvirt" / "test_faults.py").read_text()
    assert set(re.findall(r"^async def (test_\w+)", shown, re.MULTILINE)) == {each.shown_by for each in FAULTS}
