import pytest

from tests.docs.pictures import DIRECTORY, PICTURES, make, same_words, words_in

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("name", PICTURES)
async def test_a_picture_shows_what_the_command_prints_now(name: str) -> None:
    """Remake them with python -m tests.docs.pictures."""
    there = same_words(words_in((DIRECTORY / f"{name}.svg").read_text()))
    now = same_words(words_in(await make(name)))
    assert now == there
    assert len(now) > 5


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_asks_for_nothing_from_elsewhere(name: str) -> None:
    svg = (DIRECTORY / f"{name}.svg").read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert [word for word in ("http", "url(", "@font-face", "href", "<style", "<script") if word in svg] == []


def test_every_picture_of_the_command_line_has_what_makes_it() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.svg")} >= PICTURES.keys()
