"""The record on disk."""

from qmpvcpu.errors.base import Outcome, QmpVcpuError


class RecordError(QmpVcpuError):
    """The record, or the document of the next boot, cannot be read, written or trusted; the file is as it was.

    Attributes:
        path: The file's path.
        why: What is wrong.
    """

    def __init__(self, path: object, why: str, *, outcome: Outcome = Outcome.UNCHANGED) -> None:
        super().__init__(f"{path}: {why}")
        self.path = str(path)
        self.why = why
        self.outcome = outcome


class RecordCorruptError(RecordError):
    """What is on disk is no record that can be trusted or replaced without loss; it is left alone.

    Torn, hostile, damaged, too large, written by a newer version, or a document that is not ours.
    """


class RecordLockedError(RecordError):
    """Somebody else keeps this record.

    Attributes:
        pid: The process that holds it, or None where that cannot be told.
    """

    def __init__(self, path: object, pid: int | None, who: str) -> None:
        super().__init__(path, f"locked by {who}: it has one keeper at a time")
        self.pid = pid
