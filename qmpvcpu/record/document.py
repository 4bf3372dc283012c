"""Document: a record's file, saved over whatever others have made of it meanwhile. What is here blocks."""

from collections.abc import Callable

from qmpvcpu.domainxml import parse, read_identity
from qmpvcpu.domainxml.updating import identify
from qmpvcpu.errors import DomainXmlError, RecordCorruptError, RecordError, shorten
from qmpvcpu.record.kept import KeptFile

# Somebody who writes at each of so many looks does not stop.
_MOST_TRIES = 5
_MOST_TOLD = 400
_ALONE = "it is left alone: put it right, or remove it, and the next save writes what is known"


class Document:
    """The document that a record is.

    Args:
        kept: Its file.
        base: The document that is only changed in place from the first save on; None: it is written anew each time,
            until somebody edits it.
        uuid: The VM's uuid.
    """

    def __init__(self, kept: KeptFile, base: bytes | None, uuid: str) -> None:
        self._kept = kept
        self._base = base
        self._in_place = base is not None
        self._uuid = uuid
        self._opened = kept.data

    def release(self) -> None:
        """Let go of the file. Idempotent; never fails."""
        self._kept.release()

    def save(self, make: Callable[[bytes | None], bytes]) -> None:
        """Replace the document by what *make* makes of it, durably; what others have written into it stays.

        Args:
            make: Takes the document that is to be changed in place, or None if it is to be written anew.

        Raises:
            RecordLockedError: Somebody else keeps it.
            RecordError: It cannot be written; or others have made of it what is no record of this VM, or have changed
                our element in it. It is as it was.
        """
        for _ in range(_MOST_TRIES):
            self._kept.renew()
            now = self._kept.look()
            if now is None or now == self._kept.data:
                data = make(self.own)
            else:
                data = make(self._edited(now))
                self._in_place = True  # also if the save fails: nothing is lost by it
            if self._kept.replace(data, before=now):
                return
        raise RecordError(self._kept.path, f"changed by somebody else {_MOST_TRIES} times while it was to be saved")

    @property
    def own(self) -> bytes | None:
        """The VM's own document, as known, which is changed in place; None: it is written anew each time."""
        if not self._in_place:
            return None
        return self._base if self._kept.data is self._opened else self._kept.data

    def _edited(self, now: bytes) -> bytes:
        """Return the document as others have left it, to be changed in place.

        Raises:
            RecordError: It cannot be.
        """
        path, before = self._kept.path, self._kept.data
        if before is None:
            raise RecordError(path, f"somebody has put a file there that is not ours; {_ALONE}")
        known = read_identity(before)
        try:
            found = read_identity(now)
            parse(now)
        except DomainXmlError as error:
            why = f"edited by somebody, and cannot be read any more ({str(error)[:_MOST_TOLD]}); {_ALONE}"
            raise RecordCorruptError(path, why) from error
        if (found.name, found.uuid) != (known.name, known.uuid):
            told = f"{shorten(found.name)}, uuid {found.uuid}"
            raise RecordError(path, f"somebody has put the document of VM {told}, there; {_ALONE}")
        if found.metadata != known.metadata:
            raise RecordError(path, f"our own element in it was edited or removed by somebody; {_ALONE}")
        return identify(now, self._uuid)
