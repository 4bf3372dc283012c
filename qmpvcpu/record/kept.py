"""KeptFile: a file that one keeper replaces, and that others may edit all the same. What is here blocks."""

import contextlib
import fcntl
import io
import os
from pathlib import Path

from qmpvcpu.errors import RecordLockedError
from qmpvcpu.record.files import Place, close, told_as_record_error
from qmpvcpu.record.lock import Lock


class KeptFile:
    """The file at *path*, locked against other keepers until ``release``; what killed writers left is removed.

    Two locks keep others out: that of ``.NAME.lock``, which is there before the file is, and one on the file itself,
    which holds also if somebody removes the other. A file system that has none for it does without the second.

    Attributes:
        path: Where it is.
        data: What it held when it was last read at the making of this, or replaced here; None: there was no file.

    Raises:
        RecordLockedError: Somebody else keeps it.
        RecordError: It cannot be locked or read, is a symlink or no regular file, or is larger than 4 MiB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = Place(path)
        self._file: io.FileIO | None = None
        try:
            self._lock = Lock(self._place)
        except BaseException:
            self._place.close()
            raise
        try:
            self._place.check()
            self._place.sweep()
            self.data = self.look()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of it. Idempotent; never fails."""
        self._hold(None)
        self._lock.release()
        self._place.close()

    def renew(self) -> None:
        """Check that it is still kept here, and that its path still leads to it.

        Raises:
            RecordLockedError: Somebody else keeps it meanwhile.
            RecordError: The path leads to another directory, or the lock cannot be taken again.
        """
        self._lock.renew()

    def look(self) -> bytes | None:
        """Return what the file holds now, or None if there is none.

        Its content is what tells an edit: a time stamp may be that of the save before.

        Raises:
            RecordLockedError: It was replaced by somebody who keeps it too.
            RecordError: It cannot be read, is a symlink or no regular file, or is larger than 4 MiB.
        """
        status = self._place.status()
        if status is None:
            return None
        with told_as_record_error(self.path):
            is_held = self._file is not None and os.path.samestat(status, os.fstat(self._file.fileno()))
        if not is_held:
            file = self._place.open()
            if file is None:
                return None
            try:
                self._lock_itself(file)
            except BaseException:
                close(file)
                raise
            self._hold(file)
        assert self._file is not None  # noqa: S101 -- JUSTIFICATION: held above, mypy cannot know
        return self._place.read(self._file.fileno())

    def replace(self, data: bytes, *, before: bytes | None, keeps_owner: bool = False) -> bool:
        """Replace what it holds, durably, if that is still *before*; return whether it was.

        Raises:
            RecordError: As ``save``.
        """
        try:
            replaced = self._place.replace(data, keeps_owner=keeps_owner, check=lambda: self._compare(before))
        except _ChangedError:
            return False
        self._hold(replaced.file)
        self.data = data
        replaced.check(self.path)
        return True

    def _compare(self, before: bytes | None) -> None:
        # The last look at both, with nothing but the rename to come: making and syncing the new file took a while.
        self.renew()
        if self.look() != before:
            raise _ChangedError

    def _lock_itself(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordLockedError(self.path, None, "another keeper, whose lock's file is gone") from error
        except OSError:
            pass  # no locks for a file that is open for reading (NFS): the other lock is there

    def _hold(self, file: int | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        # A file object, since it says so (ResourceWarning) and closes if it is dropped without release().
        self._file = None if file is None else io.FileIO(file, "r")


class _ChangedError(Exception):
    """The file is not what it was."""
