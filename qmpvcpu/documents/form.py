"""A document as such: its schema, its line, and the exit code that goes with it."""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from qmpvcpu.model.codec import SCHEMA

REACHED: Final = 0
NOT_REACHED: Final = 1
NOT_SENT: Final = 2
NO_ANSWER: Final = 3
BAD_RECORD: Final = 4
INTERRUPTED: Final = 130


def document(**content: Any) -> dict[str, Any]:
    """Return a JSON document with its schema first."""
    return {"schema": SCHEMA, **content}


def as_line(content: Mapping[str, Any]) -> str:
    """Return *content* as one line of JSON in ASCII. JSON has no NaN and no infinity: they become strings."""
    try:
        return json.dumps(content, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_spelled(content), allow_nan=False) + "\n"


def _spelled(value: object) -> object:
    match value:
        case float() if not math.isfinite(value):
            return json.dumps(value)
        case Mapping():
            return {key: _spelled(each) for key, each in value.items()}
        case list() | tuple():
            return [_spelled(each) for each in value]
    return value
