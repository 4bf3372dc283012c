"""How a command ends: its exit code, and what it says. Needs nothing of the extra ``cli``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import RenderableType

REACHED: Final = 0
NOT_REACHED: Final = 1
NOT_SENT: Final = 2
NO_ANSWER: Final = 3
BAD_RECORD: Final = 4
INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended.

    Attributes:
        code: The exit code.
        document: What ``--json`` prints.
        text: What people see on standard output; None: all was said on the way.
        complaint: What people see on standard error.
        data: What goes to standard output byte by byte instead of a text, such as a document; None: nothing.
    """

    code: int
    document: dict[str, Any]
    text: "RenderableType | None" = None
    complaint: tuple[str, ...] = ()
    data: bytes | None = None
