"""Which run of QEMU it is."""

import contextlib
from pathlib import Path

from qmpvcpu.domainxml import Instance

__all__ = ["instance_of", "same_instance"]


def instance_of(host_tid: int | None, pid: int | None) -> Instance | None:
    """Return which run of QEMU this is, or None where vCPU 0's thread is not known.

    Args:
        host_tid: Thread id of vCPU 0 on QEMU's host.
        pid: QEMU's process id, or None where it runs on another host.

    Source:
        proc(5), ``/proc/pid/task/tid/stat``, field 22.
    """
    if host_tid is None:
        return None
    ticks = None
    if pid is not None:
        with contextlib.suppress(OSError):  # it may have ended, or be hidden from us: then only its number is known
            fields = Path(f"/proc/{pid}/task/{host_tid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks = int(fields[19])
    return Instance(host_tid, ticks)


def same_instance(before: Instance | None, now: Instance | None) -> bool:
    """Tell whether *now* may be the run of QEMU that *before* was; False only on evidence.

    What is known of one and not of the other decides nothing: to forget what was under way for want of knowledge
    would lose it, and to keep it does no harm, since the VM is read all the same.
    """
    if before is None or now is None:
        return True
    if before.host_tid != now.host_tid:
        return False
    return None in (before.start_ticks, now.start_ticks) or before.start_ticks == now.start_ticks
