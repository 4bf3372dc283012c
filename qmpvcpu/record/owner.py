"""Whose a record, or a document, is: by uuid, else by the name that a VM was given, else by the very QEMU."""

from pathlib import Path
from typing import NamedTuple

from qmpvcpu.domainxml import Identity, Instance, Metadata
from qmpvcpu.errors import RecordError
from qmpvcpu.record.instance import is_alive, same_instance

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
