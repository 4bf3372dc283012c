"""Reads the kernel's files; missing or hidden ones count as empty."""

import os
from typing import Final

_AT_ONCE: Final = 65536  # bytes


def read_text(path: str) -> str:
    """Return what is in a file of ``/proc`` or ``/sys``; "" if it is not there, or hidden.

    A process can choose any name, and the kernel cuts it at 15 bytes, so it may hold any byte or half a character:
    bytes that are not text are replaced.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # half the time of open(), and there is much to be read
    except OSError:
        return ""
    parts = []
    try:
        while part := os.read(file, _AT_ONCE):
            parts.append(part)
    except OSError:  # what it tells of has ended meanwhile
        return ""
    finally:
        os.close(file)
    return b"".join(parts).decode(errors="replace")


def names_in(directory: str) -> list[str]:
    """Return the names in a directory of ``/proc`` or ``/sys``; none if it is not there, or hidden."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - pathlib brings urllib
    except OSError:
        return []


def read_link(path: str) -> str:
    """Return what a link of ``/proc`` or ``/sys`` names; "" if it is not there, or hidden."""
    try:
        return os.readlink(path)  # noqa: PTH115 - pathlib brings urllib
    except OSError:
        return ""
