"""The server's clock, as its answers show it."""

import datetime as dt
import re
import time
from typing import Final

NS: Final = 10**9
_WAS_SET_S: Final = 30.0  # no message takes so long
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)")


def seconds_of(text: str) -> float:
    """Return the seconds since 1970 of a time as the server writes it; it has nanoseconds.

    Raises:
        ValueError: It is no time.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:60]!r} is no time")
    whole = dt.datetime.fromisoformat(found[1] + found[3].replace("Z", "+00:00"))
    nanoseconds = int((found[2] or ".").removeprefix(".")[:9].ljust(9, "0"))
    return seconds(int(whole.timestamp()) * NS + nanoseconds)


def seconds(nanoseconds: int) -> float:
    """Return the seconds since 1970; one time is one number, whichever way the server writes it."""
    return nanoseconds / NS


class Clock:
    """How far the server's clock is from this host's monotonic one."""

    def __init__(self) -> None:
        self._offset: float | None = None

    def saw(self, text: str, before: float, after: float) -> None:
        """Note that the server wrote the time *text* between *before* and *after*, which are monotonic."""
        try:
            then = seconds_of(text)
        except ValueError:
            return
        self._offset = then - (before + after) / 2

    def heard(self, then: float) -> None:
        """Note that the server has just written something at *then*: it shows whether its clock was set meanwhile."""
        if self._offset is not None and abs(then - self.now()) > _WAS_SET_S:
            self._offset = then - time.monotonic()

    def now(self) -> float:
        """Return the server's time; this host's own, while the server's is not known."""
        return time.time() if self._offset is None else time.monotonic() + self._offset
