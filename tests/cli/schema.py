"""The schema of what ``--json`` prints, as a check."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

import qmpvcpu.events
from qmpvcpu.events import Event, SlotEvent

__all__ = ["KINDS_OF_EVENT", "SCHEMA", "check", "command_of", "errors_in"]

SCHEMA: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "docs" / "schema" / "qmpvcpu-1.json").read_text(encoding="utf-8")
)

KINDS_OF_EVENT = {
    name for name, each in vars(qmpvcpu.events).items() if isinstance(each, type) and issubclass(each, Event)
} - {Event.__name__, SlotEvent.__name__}


@cache
def _validator(command: str) -> Draft202012Validator:
    return Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{command}"}]})


def command_of(arguments: Iterable[object]) -> str:
    """Return the name of the definition for what these words print."""
    return next((word for word in map(str, arguments) if word in SCHEMA["$defs"]), "usage")


def errors_in(document: Mapping[str, Any], command: str) -> list[str]:
    """Return what is wrong with *document* by the definition of *command*."""
    return [_told(error) for error in _validator(command).iter_errors(document)]


def _told(error: Any) -> str:
    """Return the deepest reason of an error in one of many branches."""
    while error.context:
        error = max(error.context, key=lambda each: len(each.absolute_path))
    return f"{list(error.absolute_path)}: {error.message[:300]}"


def check(document: Mapping[str, Any], command: str) -> None:
    """Assert that *document* is what *command* is said to print."""
    assert errors_in(document, command) == [], (command, document)
