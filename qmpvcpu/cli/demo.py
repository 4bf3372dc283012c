"""The words of ``qmpvcpu demo``, which is played without them where typer is not installed."""

from pathlib import Path
from typing import Annotated

import typer

from qmpvcpu.cli.demo_work import GuestKind
from qmpvcpu.cli.demo_work import demo as play
from qmpvcpu.cli.options import Options, Saying
from qmpvcpu.cli.run import carry_out


def demo(
    *,
    guest: Annotated[
        GuestKind, typer.Option("--guest", help="microguest: up in a tenth of a second. linux: a real Linux.")
    ] = GuestKind.MICROGUEST,
    qemu: Annotated[
        Path | None,
        typer.Option(
            "--qemu", metavar="PATH", help="The QEMU to run. Else QMPVCPU_QEMU, else the newest.", show_default=False
        ),
    ] = None,
    options: Saying,
) -> int:
    """Start a VM and show every verdict on it, with the map after each step and the XML at the end.

    Needs a qemu-system-x86_64 and nothing else: the guest is some hundred bytes that come with the package. The Linux
    guest is made by fixtures/linux/build.sh. KVM is used where it runs the guest, else TCG.

    In the map, [3] is plugged, (3) is plugged with a removal pending, [ ] is free.

      qmpvcpu demo

      qmpvcpu demo --guest linux --verbose

    Exit codes: 0 every step went as expected; 1 one did not; 2 no QEMU, or no Linux guest; 3 QEMU did not start, or
    was lost; 130 stopped by SIGINT or SIGTERM.
    """
    return carry_out(Options(json=options.json, verbose=options.verbose), lambda shell: play(shell, guest, qemu))
