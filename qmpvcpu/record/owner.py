"""Whose a record, or a document, is: by uuid, else by the name that a VM was given, else by the very QEMU."""

import contextlib
import re
from pathlib import Path
from typing import Final, NamedTuple

from qmpvcpu.domainxml import Identity, Instance, Metadata
from qmpvcpu.errors import RecordError

# A hostile document's names can be as long as it is.
_MOST_TOLD = 400
_SAY_SO = "Start QEMU with -uuid or -name, or say who it is: attach(name=...)"


class Claim(NamedTuple):
    """Who asks for a record, or a document.

    Attributes:
        name: The VM's name.
        named: False if that is a label, which tells nothing.
        uuid: Its uuid, or None.
        instance: The QEMU that runs it, or None where not known.
        arrived: True if it has migrated into that QEMU, with its record.
    """

    name: str
    named: bool
    uuid: str | None
    instance: Instance | None = None
    arrived: bool = False


def refuse_other(path: Path, found: Identity, metadata: Metadata, claim: Claim) -> None:
    """Refuse the record of another VM: see "Whose record it is" in ``docs/continuity.md``.

    Raises:
        RecordError: It is one.
    """
    told = found.name[:_MOST_TOLD]
    # A VM without uuid has the one that we made up for it, and no other.
    if found.uuid is None or found.uuid != (claim.uuid or metadata.uuid):
        ours = "none" if claim.uuid is None else claim.uuid
        raise RecordError(path, f"the record of a VM with uuid {found.uuid}; this QEMU has {ours}; it is left alone")
    same = same_instance(metadata.instance, claim.instance)
    proven = same and None not in (metadata.instance, claim.instance)
    if claim.uuid is None and not proven:
        if not claim.named:
            why = (
                f"the record of VM {told!r}, and nothing tells whether this is that VM: QEMU has neither a uuid nor a"
                " name, and is another run of it"
            )
            raise RecordError(path, f"{why}; it is left alone. {_SAY_SO}")
        if found.name != claim.name:
            raise RecordError(path, f"the record of VM {told!r}, not of {claim.name!r}; it is left alone")
    if metadata.instance is not None and not same and not claim.arrived and is_alive(metadata.instance):
        why = (
            f"the record of VM {told!r}, whose QEMU still runs (its vCPU 0 is thread {metadata.instance.host_tid}):"
            " what answers here is another VM. If it has migrated here, attach with arrived=True"
        )
        raise RecordError(path, f"{why}; it is left alone")


def refuse_other_document(path: Path, name: str, uuid: str | None, claim: Claim) -> None:
    """Refuse the document of another VM, called *name* and with *uuid* there.

    If the VM has neither a uuid nor a name, nothing is checked: the caller says whose document it is.

    Raises:
        RecordError: It is one: by its uuid where both have one, else by the name that the VM was given.
    """
    told = f"the document of VM {name[:_MOST_TOLD]!r}, uuid {uuid}"
    if None not in (uuid, claim.uuid):
        if uuid != claim.uuid:
            raise RecordError(path, f"{told}, not of one with uuid {claim.uuid}")
    elif claim.named and name != claim.name:
        raise RecordError(path, f"{told}, not of {claim.name[:_MOST_TOLD]!r}, uuid {claim.uuid}")


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
