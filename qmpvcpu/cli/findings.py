"""What ``doctor`` finds, and how it names whose a file is."""

import enum
import grp
import pwd
from dataclasses import dataclass


class Level(enum.Enum):
    """How much a finding matters.

    OK: as it should be. NOTE: to be known. WARNING: something does not work that may be needed. FAULT: what was asked
    about does not work.
    """

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: How much it matters.
        subject: What was looked at.
        found: What is so.
        advice: What to do next, or "".
    """

    level: Level
    subject: str
    found: str
    advice: str = ""


def owner_of(uid: int, gid: int) -> str:
    """Return user and group in words where they have names."""
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    try:
        return f"{user}:{grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"{user}:{gid}"
