import re

import pytest

from tests.docs.pictures import DIRECTORY, PICTURES, make, same_words, words_in

pytestmark = pytest.mark.qemu


# What doctor finds is of the machine; of any it says these.
OF_ANY_MACHINE = ("qmpvcpu:", "QEMU, ACCELERATOR:", "QEMU: known fault", "VM:", "plug:", "unplug:", "ok guest:")


def findings(lines: list[str]) -> set[str]:
    """What is found on any machine, however many QEMUs it has, each with its level."""
    # Joined first: where a line is broken depends on how many digits a figure before it has.
    whole = re.sub(r"\n(?!(ok|note|warning|fault) )", " ", "\n".join(line.strip() for line in lines))
    said = {re.sub(r"\d+(\.\d+)+", "VERSION", line) for line in same_words(whole.splitlines())}
    said = {line.replace("QEMU, VERSION", "QEMU") for line in said}
    of_old = "before VERSION"  # which not every machine has
    return {line for line in said if any(word in line for word in OF_ANY_MACHINE) and of_old not in line}


@pytest.mark.parametrize("name", sorted(PICTURES.keys() - {"doctor"}))
async def test_a_picture_shows_what_the_command_prints_now(name: str) -> None:
    """Remake them with python -m tests.docs.pictures."""
    there = same_words(words_in((DIRECTORY / f"{name}.svg").read_text()))
    now = same_words(words_in(await make(name)))
    assert now == there
    assert len(now) > 5


async def test_the_picture_of_doctor_shows_what_it_says_of_any_machine() -> None:
    there = findings(words_in((DIRECTORY / "doctor.svg").read_text()))
    assert there == findings(words_in(await make("doctor")))
    assert [word for word in OF_ANY_MACHINE if not any(word in each for each in there)] == []


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_asks_for_nothing_from_elsewhere(name: str) -> None:
    svg = (DIRECTORY / f"{name}.svg").read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert [word for word in ("http", "url(", "@font-face", "href", "<style", "<script") if word in svg] == []


def test_every_picture_of_the_command_line_has_what_makes_it() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.svg")} >= PICTURES.keys()
