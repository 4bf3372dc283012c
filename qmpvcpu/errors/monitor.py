"""The QMP connection."""

from qmpvcpu.errors.base import Outcome, QmpVcpuError, clip, shorten


class MonitorError(QmpVcpuError):
    """Something is wrong with the QMP connection."""


class MonitorConnectError(MonitorError):
    """No QMP session came about.

    Attributes:
        address: What was connected to, as text.
        why: What happened.
        hint: What the kernel tells about the peer and what to do about it, or "".
    """

    def __init__(self, address: str, why: str, *, hint: str = "") -> None:
        super().__init__(f"cannot speak QMP on {clip(address)}: {why}" + (f" ({hint})" if hint else ""))
        self.address = address
        self.why = why
        self.hint = hint


class MonitorTimeoutError(MonitorError, TimeoutError):
    """QEMU did not reply to a command within its deadline; it may still carry it out.

    Attributes:
        command: The QMP command.
        timeout: The deadline, in seconds.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, command: str, timeout: float) -> None:
        super().__init__(f"QEMU did not reply to {command} within {timeout:g} s")
        self.command = command
        self.timeout = timeout


class MonitorLostError(MonitorError, ConnectionError):
    """The QMP session ended: QEMU died, hung up, or this side closed it.

    Attributes:
        why: What ended it.
        last_sent: The QMP command that was in flight, or None.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, why: str, *, last_sent: str | None = None) -> None:
        flight = f" with {last_sent} in flight" if last_sent else ""
        super().__init__(f"the QMP connection is lost{flight}: {why}")
        self.why = why
        self.last_sent = last_sent


class MalformedReplyError(MonitorError):
    """A reply is not of the shape that QEMU's schema promises.

    Attributes:
        command: The QMP command.
        reply: What came back.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, command: str, why: str, reply: object) -> None:
        super().__init__(f"malformed reply to {command}: {why}: {shorten(reply)}")
        self.command = command
        self.reply = reply
