"""What a command comes to: an exit code, words for people, and one JSON document for programs."""

from typing import TYPE_CHECKING, Any

from qmpvcpu.errors import printable

if TYPE_CHECKING:
    from qmpvcpu.cli.output import Block


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
