"""What all errors share, and errors about input."""

import enum
import json
from collections.abc import Collection
from typing import Final

_MOST_NAMED: Final = 8


class Outcome(enum.Enum):
    """What became of the VM when an error was raised."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    UNKNOWN = "unknown"


class QmpVcpuError(Exception):
    """Base of all errors of qmpvcpu.

    Attributes:
        outcome: What became of the VM.
    """

    outcome: Outcome = Outcome.UNCHANGED

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidMapError(QmpVcpuError, ValueError):
    """A set of vCPU ids cannot be read.

    Attributes:
        text: What was given.
    """

    def __init__(self, text: object, why: str) -> None:
        super().__init__(f"{shorten(text)} is no set of vCPU ids: {why}")
        self.text = text


class DomainXmlError(QmpVcpuError, ValueError):
    """A domain document is not well-formed, not safe to read, or not what libvirt means.

    Attributes:
        line: Line of the document, from 1, or None.
    """

    def __init__(self, message: str, *, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.line = line


class WaitTimeoutError(QmpVcpuError, TimeoutError):
    """A condition that was waited for did not come true in time; nothing was changed by waiting.

    Attributes:
        timeout: The deadline, in seconds.
        enabled: The vCPUs that are plugged, as text.
        pending: The vCPUs whose removal is unanswered, as text.
    """

    def __init__(self, timeout: float, enabled: str, pending: str) -> None:
        waiting = f", of which {pending} pending" if pending else ""
        super().__init__(f"the condition did not hold within {timeout:g} s; plugged are {enabled}{waiting}")
        self.timeout = timeout
        self.enabled = enabled
        self.pending = pending


def describe(action: str, vcpus: Collection[int]) -> str:
    """Name a step as errors and logs do, such as ``unplug of vCPU 3``."""
    if not vcpus:
        return action
    if len(vcpus) == 1:
        return f"{action} of vCPU {next(iter(vcpus))}"
    if max(vcpus) - min(vcpus) == len(vcpus) - 1:
        return f"{action} of vCPUs {min(vcpus)}-{max(vcpus)}"
    shown = sorted(vcpus)[:_MOST_NAMED]
    return f"{action} of vCPUs {','.join(map(str, shown))}{',...' if len(vcpus) > _MOST_NAMED else ''}"


def printable(text: str, *, lines: bool = False) -> str:
    """Return *text* from outside as it may reach a terminal, a log or a report: what is not printable is escaped.

    Escaped as in Python are control characters (ESC, 0x80 to 0x9f, line breaks), characters that turn the direction
    of text or take no room, and bytes of file names that are no text. Printable text stays as it is, backslashes too,
    so that escaping twice changes nothing.

    Args:
        text: The text.
        lines: Leave line breaks and tabs, for text of our own that has several lines.

    Returns:
        The text in printable characters.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode() for each in text
    )


def shorten(value: object, limit: int = 300) -> str:
    """Return *value* as JSON text of at most about *limit* characters, for messages."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = repr(value)
        except (ValueError, RecursionError):  # an int of thousands of digits, or a list in a list in a list ...
            text = f"a very large {type(value).__name__}"
    return clip(text, limit)


def clip(text: str, limit: int = 300) -> str:
    """Return at most about *limit* characters of a peer's *text*, which can be encoded.

    JSON can say half of a surrogate pair, and then no file, terminal or socket takes the text.
    """
    shown = text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
    return shown.encode(errors="backslashreplace").decode()
