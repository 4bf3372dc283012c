"""The options of commands that change a VM or its next boot, each written once."""

from collections.abc import Mapping
from typing import Any

import click

from qmpvcpu.cli.options import TIMEOUT, File, Seconds, flag, option
from qmpvcpu.cli.result import BadUsageError
from qmpvcpu.model.options import Affect, OnFailure, Proof

ALLOW_FATAL = flag("--allow-fatal", "Allow even what this QEMU is known not to survive.")
ALLOW_BOOT_VCPUS = flag(
    "--allow-boot-vcpus", "Allow boot vCPUs to leave even a VM that libvirt runs: libvirtd would lose it."
)
SAFETY_OPTIONS = (ALLOW_FATAL, ALLOW_BOOT_VCPUS)
INCLUDE_BOOT = flag("--include-boot", "Take boot vCPUs out too, highest first, never 0.")

PROOF = option(
    "--proof",
    metavar="PROOF",
    default=Proof.PRESENT,
    help="What a plug must prove within --timeout. present: QEMU has it. acknowledged: the guest says that it took"
    " it. started: it has run guest code. online: the guest's agent shows it online (--agent).",
)
ONLINE = option(
    "--online/--no-online",
    default=True,
    help="With --proof online: have the agent bring online what the guest leaves offline, or only check.",
)
PROOF_OPTIONS = (PROOF, ONLINE)
OFFLINE_FIRST = flag(
    "--offline-first",
    "Have the agent (--agent) take a vCPU offline in the guest before QEMU is asked to remove it. If the guest"
    " refuses, nothing is sent to QEMU, and nothing is pending.",
)
CONFIG = option(
    "--config",
    metavar="PATH",
    type=File(),
    help="The domain XML that the VM is next started from. Else the record keeps the next boot.",
)
AFFECT = option(
    "--affect",
    default=Affect.LIVE,
    help="live: the VM as it runs. config: its next boot; QEMU is not asked. both: first live, then config.",
)
BASE = option(
    "--base",
    metavar="FILE",
    type=File(),
    help="The VM's own domain XML, for a --record that is not there yet: it begins as that document.",
)
NEXT_BOOT_OPTIONS = (AFFECT, CONFIG, BASE)
MAP_OPTIONS = (
    option(
        "--on-failure",
        default=OnFailure.STOP,
        help="When one fails. stop: ask for nothing more. continue: do the others. revert: undo what was done.",
    ),
    TIMEOUT,
    option(
        "--total-timeout",
        metavar="SECONDS",
        type=Seconds(),
        help="How long all of it may take; undoing not counted.",
    ),
    option(
        "--revert-timeout",
        metavar="SECONDS",
        type=Seconds(),
        help="How long the guest has for each answer while steps are undone (as --timeout).",
    ),
    option(
        "--in-flight",
        metavar="N",
        type=click.IntRange(min=1),
        default=8,
        help="Commands on their way at once. With stop, removals go one at a time all the same.",
    ),
    *PROOF_OPTIONS,
    OFFLINE_FIRST,
)


def check_together(affect: Affect, change: Mapping[str, Any]) -> None:
    """Make sure that the options of a *change* that are about the guest have an effect.

    Raises:
        BadUsageError: One of them has none.
    """
    proof = change.get("proof", Proof.PRESENT)
    if not change.get("online", True) and proof is not Proof.ONLINE:
        raise BadUsageError("--no-online goes with --proof online: for another proof nothing is brought online")
    if affect is Affect.CONFIG:
        named = [] if proof is Proof.PRESENT else ["--proof"]
        named += ["--offline-first"] if change.get("offline_first") else []
        named += ["--placement"] if isinstance(change.get("placement"), str) else []
        if named:
            are = "are" if len(named) > 1 else "is"
            raise BadUsageError(
                f"{' and '.join(named)} {are} about the running VM, which --affect config leaves as it is"
            )


def next_boot_file(affect: Affect, config: str | None, record: str | None, base: str | None = None) -> str:
    """Return the file that keeps the next boot; "" where that is not affected.

    Raises:
        BadUsageError: None was named, or one that would not be written; or *base* would not be read.
    """
    if base is not None and (affect is Affect.CONFIG or record is None):
        raise BadUsageError("--base is what the record of the running VM begins as: it goes with --record PATH")
    if affect is Affect.LIVE:
        if config is not None:
            raise BadUsageError(
                "--config names what keeps the next boot, which --affect live leaves as it is: add --affect config"
                " or --affect both"
            )
        return ""
    path = config or record
    if path is None:
        raise BadUsageError(
            f"--affect {affect.value}: what keeps the next boot? Name the VM's domain XML with --config PATH"
            ", or its record with --record PATH"
        )
    return path
