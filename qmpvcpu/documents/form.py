"""What all documents share: the schema, the form on one line, and the exit codes."""

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
    """Return a JSON document that begins with its schema."""
    return {"schema": SCHEMA, **content}


def as_line(content: Mapping[str, Any]) -> str:
    """Return *content* as one line of ASCII JSON. NaN and infinities become strings, since JSON has neither."""
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
