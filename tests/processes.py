"""Processes that are nobody's children here: what /proc tells of them."""

from pathlib import Path


def is_gone(pid: int) -> bool:
    """Whether there is no such process, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
