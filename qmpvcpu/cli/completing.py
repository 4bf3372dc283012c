"""What a shell offers for a vCPU id: those that a look at the VM finds, if it answers at once.

Shells evaluate what they are offered (zsh twice), and QEMU's properties come from outside: only numbers, and names of
small letters and dashes, are passed on.
"""

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import typer

import qmpvcpu
from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.model.layout import Layout, Vcpu

# Who presses a key does not wait for a VM whose socket somebody holds.
_PATIENCE_S = 0.5
_NAME: Final = re.compile(r"[a-z-]+")


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
    return [(word, place) for word, place in words(layout, fits) if word.startswith(incomplete)]


async def _look(address: str) -> Layout:
    async with qmpvcpu.attach(address, reply_timeout=_PATIENCE_S, resync_interval=None) as vm:
        return vm.layout


def words(layout: Layout, fits: Callable[[Vcpu], bool]) -> Iterator[tuple[str, str]]:
    """Return the first id of every slot whose vCPU *fits*, with its place in the machine."""
    for slot in layout.slots:
        if fits(layout[slot.first]):
            yield str(slot.first), _place(slot.props)


def _place(props: Mapping[str, Any]) -> str:
    """Return where a slot is, in words that no shell reads as anything but words."""
    return " ".join(
        f"{name.removesuffix('-id')} {value}"
        for name, value in props.items()
        if _NAME.fullmatch(name) and type(value) is int
    )
