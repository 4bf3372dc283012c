"""Signals to processes of a test; a stop is waited for."""

import contextlib
import os
import signal
import time
from typing import Final

from qmpvcpu.host.processes import is_suspended

_POLL_S: Final = 0.0005


def send_signal(pid: int, sig: signal.Signals) -> None:
    """Send *sig* to a process; nothing happens when it has ended.

    After SIGSTOP it returns when no thread of the process runs any more. The kernel stops one after the other, which
    on a busy machine takes longer than a whole exchange with the others: a QEMU may greet before it stands still.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sig)
        while sig == signal.SIGSTOP and not is_suspended(pid):
            time.sleep(_POLL_S)
