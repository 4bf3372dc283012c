"""What was said on a QEMU's monitors, told by QEMU itself.

QEMU's trace log is the witness: it has every client on every monitor, costs no time, and nothing stands between a
client and its QEMU. A QEMU that was built without the trace backend ``log`` writes none.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

TRACE_FILE: Final = "qmp.log"
TRACE_ARGUMENTS: Final = (
    *("-msg", "timestamp=on"),
    *("-trace", "handle_qmp_command", "-trace", "monitor_qmp_respond"),
    *("-D", TRACE_FILE),
)
"""Arguments that make QEMU, which runs in its own directory, write what :func:`read_transcript` reads."""

_LINE: Final = re.compile(
    r"(?:\d+@(?P<at>\d+\.\d+):|(?P<date>\d{4}-\S+Z) )"
    r"(?P<event>handle_qmp_command|monitor_qmp_respond) mon (?P<monitor>\S+) (?:req|resp): (?P<content>.*)"
)


@dataclass(frozen=True, slots=True)
class QmpMessage:
    """One message on a monitor.

    Attributes:
        at: When QEMU read or wrote it, in seconds since the epoch.
        monitor: Which of QEMU's monitors, counted from 1 in the order in which their first clients came.
        sender: Who said it. A client's message is here once it was parsed: of garbage there is only the error.
        content: The message.
    """

    at: float
    monitor: int
    sender: Literal["client", "qemu"]
    content: Mapping[str, Any]

    def __str__(self) -> str:
        return json.dumps(self.content)


def read_transcript(trace: str) -> Iterator[QmpMessage]:
    """The messages in a trace log, in order.

    Left out: the monitor on which :class:`~qmpvcpu.testing.QemuProcess` itself waits for QEMU, which is the first to
    be greeted, before anybody else can connect; events on a monitor that has had no client yet; a line that was cut
    short. Events that QEMU emitted when a client had left look like those that it saw.

    Source:
        QEMU monitor/trace-events, ``handle_qmp_command`` and ``monitor_qmp_respond``; the same from 7.2 to 11.1.
        Before them stand the process id and the time up to 10.0, the time of ``-msg timestamp=on`` in 11.1.
    """
    monitors: dict[str, int] = {}
    for match in map(_LINE.fullmatch, trace.splitlines()):
        if match is None:
            continue
        try:
            content = json.loads(match["content"])
        except json.JSONDecodeError:
            continue
        if "QMP" in content:
            monitors.setdefault(match["monitor"], len(monitors))
        if number := monitors.get(match["monitor"], 0):
            sender: Literal["client", "qemu"] = "client" if match["event"] == "handle_qmp_command" else "qemu"
            at = float(match["at"] or datetime.fromisoformat(match["date"]).timestamp())
            yield QmpMessage(at, number, sender, content)
