"""Which run of QEMU it is."""

import contextlib
import re
from pathlib import Path
from typing import Final

from qmpvcpu.domainxml import Instance

# States of a thread that runs no more.
_GONE: Final = ("Z", "X", "x")


def instance_of(host_tid: int | None, pid: int | None) -> Instance | None:
    """Return which run of QEMU this is, or None where vCPU 0's thread is not known.

    Args:
        host_tid: Thread id of vCPU 0 on QEMU's host.
        pid: QEMU's process id, or None where it runs on another host.

    Source:
        proc(5), ``/proc/pid/task/tid/stat``, fields 3 and 22; ``/proc/pid/status``, NSpid.
    """
    if host_tid is None:
        return None
    return Instance(host_tid, None if pid is None else _start_ticks(Path(f"/proc/{pid}/task"), host_tid))


def _start_ticks(tasks: Path, host_tid: int) -> int | None:
    """Return when the thread started that its own process calls *host_tid*.

    None: it has ended, or is hidden from us.
    """
    found = _started(tasks / str(host_tid) / "stat")
    if found is None:
        with contextlib.suppress(OSError):  # in a PID namespace of its own (a container) it has another number here
            for task in tasks.iterdir():
                inside = re.search(r"^NSpid:.*\s(\d+)$", (task / "status").read_text(errors="replace"), re.MULTILINE)
                if inside is not None and int(inside[1]) == host_tid:
                    return _started(task / "stat")
    return found


def _started(stat: Path) -> int | None:
    try:
        fields = stat.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in _GONE else int(fields[19])


def is_alive(instance: Instance) -> bool:
    """Tell whether *instance* still runs on this host; True only on evidence."""
    started = _started(Path(f"/proc/{instance.host_tid}/stat"))
    return started is not None and started == instance.start_ticks


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
