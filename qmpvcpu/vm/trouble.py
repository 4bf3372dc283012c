"""Trouble: background work that fails goes on, and says so once."""

import logging

from qmpvcpu.errors import QmpVcpuError, printable

_log = logging.getLogger("qmpvcpu.vm")


class Trouble:
    """A run of failures of one kind of background work: logged as it begins and once it is over, not in between.

    Args:
        what: What fails, such as ``cannot read vm``.
        vm: The VM's name, for the log's extra field.
    """

    def __init__(self, what: str, vm: str) -> None:
        self._what = printable(what)
        self._extra = {"vm": printable(vm)}
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Note a failure."""
        self._failures += 1
        why = printable(str(error))
        cause = None if isinstance(error, QmpVcpuError) else error
        if self._failures == 1:
            _log.warning("%s: %s", self._what, why, extra=self._extra, exc_info=cause)
        else:
            _log.debug("%s: %s", self._what, why, extra=self._extra, exc_info=cause)

    def over(self) -> None:
        """Note a success, after which the next failure is news again."""
        if self._failures:
            _log.info("%s: over, after %d failures", self._what, self._failures, extra=self._extra)
            self._failures = 0
