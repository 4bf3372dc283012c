"""What real agents said: fixtures/captures/agent."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[2] / "fixtures" / "captures" / "agent"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


class Exchange(NamedTuple):
    """A question, and its answer."""

    command: str
    arguments: dict[str, Any]
    answer: dict[str, Any]


def exchanges(name: str) -> Iterator[Exchange]:
    """All questions of a recording that were answered, each with its answer."""
    wire = json.loads((FOLDER / f"{name}.json").read_text())["wire"]
    for question, answer in itertools.pairwise(wire):
        if question["dir"] == ">" and answer["dir"] == "<":
            yield Exchange(question["msg"]["execute"], question["msg"].get("arguments", {}), answer["msg"])


def answers(name: str, command: str) -> list[dict[str, Any]]:
    """All answers to *command* in a recording."""
    return [each.answer for each in exchanges(name) if each.command == command]
