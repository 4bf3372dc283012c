"""What a command comes to: an exit code, words for people, and one JSON document for programs."""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.errors import printable

if TYPE_CHECKING:
    from qmpvcpu.cli.output import Block

REACHED: Final = 0
NOT_REACHED: Final = 1
NOT_SENT: Final = 2
NO_ANSWER: Final = 3
BAD_RECORD: Final = 4
INTERRUPTED: Final = 130

SCHEMA: Final = "qmpvcpu/1"


class BadUsageError(Exception):
    """The command line asks for something that makes no sense; nothing was sent."""

    def __str__(self) -> str:
        return printable(super().__str__())


class CommandResult:
    """How a command ended.

    Attributes:
        code: The exit code.
        document: What ``--json`` prints; empty: everything was printed on the way.
        text: What people see on standard output; empty: everything was printed on the way.
        complaint: Lines for people on standard error.
        data: Bytes for standard output instead of *text*, such as an XML document; None: there are none.
    """

    def __init__(
        self,
        code: int,
        document: dict[str, Any],
        text: "tuple[Block, ...]" = (),
        complaint: tuple[str, ...] = (),
        data: bytes | None = None,
    ) -> None:
        self.code = code
        self.document = document
        self.text = text
        self.complaint = complaint
        self.data = data


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
