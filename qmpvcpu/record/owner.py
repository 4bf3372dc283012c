"""Whose a record or a document is: known by uuid, else by the name that a VM was given, else by its very QEMU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from qmpvcpu.domainxml import Identity, Instance
from qmpvcpu.errors import RecordError
from qmpvcpu.host.processes import read_stat
from qmpvcpu.host.threads import find
from qmpvcpu.model.layout import Layout, Slot

# In a hostile document a name can be as long as the document.
MOST_TOLD: Final = 400
_SAY_SO: Final = "Start QEMU with -uuid or -name, or name the VM: attach(name=...)"
_ELSE: Final = "name another record, or, if it is the same VM, start QEMU with the record's"


class Claim(NamedTuple):
    """The VM that asks for a record or a document.

    Attributes:
        name: Its name.
        uuid: The uuid that QEMU reports, or None.
        named: False if *name* is only a label, which proves nothing.
        instance: The QEMU that runs it, or None where not known.
        arrived: True if it has migrated into that QEMU, with its record.
    """

    name: str
    uuid: str | None = None
    named: bool = True
    instance: Instance | None = None
    arrived: bool = False

    @classmethod
    def of(cls, layout: Layout) -> "Claim":
        """Return the claim of a running VM."""
        vm = layout.vm
        return cls(vm.name, vm.uuid, vm.named, instance_running(layout.slots, None))


def refuse_other(path: Path, found: Identity, claim: Claim) -> None:
    """Raise RecordError if it is another VM's record: see "Whose record it is" in ``docs/continuity.md``."""
    metadata = found.metadata
    made_up, instance = (None, None) if metadata is None else (metadata.uuid, metadata.instance)
    told = found.name[:MOST_TOLD]
    # The record of a VM without uuid has the one that we made up for it, and no other.
    if found.uuid is None or found.uuid != (claim.uuid or made_up):
        why = f"the record of a VM with {_uuid(found.uuid)}; this QEMU has {_uuid(claim.uuid)}; it is left alone"
        raise RecordError(path, why if found.uuid is None else f"{why}: {_ELSE} -uuid")
    proven = None not in (instance, claim.instance) and same_instance(instance, claim.instance)
    if claim.uuid is None and not proven:
        if not claim.named:
            why = (
                f"the record of VM {told!r}, and nothing shows whether this is that VM: QEMU has neither a uuid nor a"
                " name, and is another run of it"
            )
            raise RecordError(path, f"{why}; it is left alone. {_SAY_SO}")
        if found.name != claim.name:
            why = f"the record of VM {told!r}, not of {claim.name!r}; it is left alone"
            raise RecordError(path, f"{why}: {_ELSE} -name")
    _refuse_living(path, found, claim)


def refuse_other_document(path: Path, found: Identity, claim: Claim) -> None:
    """Raise RecordError if it is another VM's document, or a record whose VM runs in another QEMU.

    It is another VM's if the uuid differs, or the name where one of the two has no uuid. If the VM has neither, only
    its QEMU is checked: the caller says whose document it is.
    """
    told = f"the document of VM {found.name[:MOST_TOLD]!r}, with {_uuid(found.uuid)}"
    if None not in (found.uuid, claim.uuid):
        if found.uuid != claim.uuid:
            raise RecordError(path, f"{told}, not of one with {_uuid(claim.uuid)}")
    elif claim.named and found.name != claim.name:
        raise RecordError(path, f"{told}, not of {claim.name[:MOST_TOLD]!r}, with {_uuid(claim.uuid)}")
    _refuse_living(path, found, claim)


def _uuid(uuid: str | None) -> str:
    return "no uuid" if uuid is None else f"uuid {uuid}"


def _refuse_living(path: Path, found: Identity, claim: Claim) -> None:
    instance = None if found.metadata is None else found.metadata.instance
    if instance is None or claim.arrived or same_instance(instance, claim.instance) or not is_alive(instance):
        return
    why = (
        f"the record of VM {found.name[:MOST_TOLD]!r}, whose QEMU still runs (its vCPU 0 is thread"
        f" {instance.host_tid}): what answers here is another VM. If it has migrated here, attach with arrived=True"
    )
    raise RecordError(path, f"{why}; it is left alone")


# Which run of QEMU it is.


def instance_running(slots: Sequence[Slot], pid: int | None) -> Instance | None:
    """Return which run of QEMU has these *slots*; *pid* as in ``instance_of``."""
    tids = slots[0].host_tids if slots else ()
    return instance_of(tids[0] if tids else None, pid)


def instance_of(host_tid: int | None, pid: int | None) -> Instance | None:
    """Return which run of QEMU this is, or None where vCPU 0's thread is not known.

    Args:
        host_tid: Thread id of vCPU 0 on QEMU's host.
        pid: QEMU's process id, or None where it is not known, or on another host.

    Source:
        proc(5), ``/proc/pid/task/tid/stat``, fields 3 and 22; ``/proc/pid/status``, NSpid.
    """
    if host_tid is None:
        return None
    thread = None if pid is None else find(pid, [host_tid]).get(host_tid)
    return Instance(host_tid, None if thread is None else thread.start_ticks)


def is_alive(instance: Instance) -> bool:
    """Return True if *instance* is known to run on this host."""
    found = read_stat(instance.host_tid)
    return found is not None and not found.has_ended and found.start_ticks == instance.start_ticks


def same_instance(before: Instance | None, now: Instance | None) -> bool:
    """Return False if *now* is known to be another run of QEMU than *before*.

    What is known about only one of them decides nothing: forgetting what was under way would lose it, and keeping it
    does no harm, since the VM is read anyway.
    """
    if before is None or now is None:
        return True
    if before.host_tid != now.host_tid:
        return False
    return None in (before.start_ticks, now.start_ticks) or before.start_ticks == now.start_ticks
