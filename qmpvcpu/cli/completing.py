"""What a shell offers for a vCPU id: those that a look at the VM finds, if it answers at once."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator

import typer

import qmpvcpu
from qmpvcpu import Layout, Vcpu
from qmpvcpu.errors import QmpVcpuError

__all__ = ["ids_to_plug", "ids_to_unplug"]

# Who presses a key does not wait for a VM whose socket somebody holds.
_PATIENCE_S = 0.5


def ids_to_plug(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the free vCPU ids that begin with *incomplete*, each with its place."""
    return _offered(context, incomplete, lambda vcpu: not vcpu.enabled)


def ids_to_unplug(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the ids of vCPUs that can leave and begin with *incomplete*, each with its place."""
    return _offered(context, incomplete, lambda vcpu: vcpu.hotpluggable)


def _offered(context: typer.Context, incomplete: str, fits: Callable[[Vcpu], bool]) -> list[tuple[str, str]]:
    named = (given.params.get("qmp") for given in (context, context.parent) if given is not None)
    address = next((each for each in named if each), os.environ.get("QMPVCPU_QMP"))
    if not address:
        return []
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    try:
        layout = asyncio.run(_look(address))
    except QmpVcpuError:
        return []
    return [(word, place) for word, place in _words(layout, fits) if word.startswith(incomplete)]


async def _look(address: str) -> Layout:
    async with qmpvcpu.attach(address, timeout=_PATIENCE_S, resync_interval=None) as vm:
        return vm.layout


def _words(layout: Layout, fits: Callable[[Vcpu], bool]) -> Iterator[tuple[str, str]]:
    for slot in layout.slots:
        if fits(layout[slot.first]):
            yield (
                str(slot.first),
                " ".join(f"{name.removesuffix('-id')} {value}" for name, value in slot.props.items()),
            )
