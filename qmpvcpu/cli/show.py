"""How a layout is shown: its state in a line, and every vCPU in a table."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from qmpvcpu.cli.output import Block, Column, Line, Table
from qmpvcpu.errors import counted, printable
from qmpvcpu.model.layout import Layout, Vcpu
from qmpvcpu.model.options import Proof

if TYPE_CHECKING:
    from qmpvcpu.model.placement import QemuThread

WIDE: Final = 78
"""Letters that the table of vCPUs needs; a narrower terminal gets the columns that fit into 40."""

# With a column for the proofs the whole table needs these.
_WIDEST: Final = 96

# Longer tables name free vCPUs in one line instead.
_MOST_IN_TABLE: Final = 64
# QEMU names them in no particular order.
_LEVELS: Final = (
    *("drawer-id", "book-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id"),
)
_RIGHT: Final = ("id", "slot", "order", "node", "host tid", "last on")
_STYLES: Final = {"plugged": "green", "pending": "bold yellow"}
_MINUTE: Final = 60
_HOUR: Final = 3600

_Field = tuple[str, Callable[[Vcpu], str]]


def state_text(layout: Layout) -> str:
    """Return the map, drawn and named."""
    drawn = str(layout)
    return f"{drawn}  plugged {layout.enabled}{_pending(layout)}" if drawn.startswith("[") else f"plugged {drawn}"


def _pending(layout: Layout) -> str:
    return f", pending {layout.pending}" if layout.pending else ""


def age(seconds: float) -> str:
    """Return how long something has lasted, as people read it."""
    if seconds < _MINUTE:
        return f"{int(seconds)} s"
    return f"{int(seconds / _MINUTE)} min" if seconds < _HOUR else f"{int(seconds / _HOUR)} h"


def headline(layout: Layout, width: int | None = None) -> str:
    """Return the VM and its map in one line; in two if they are longer than *width*."""
    vm = layout.vm
    version = ".".join(map(str, vm.qemu_version))
    head = printable(f"{vm.name} ({vm.machine}, {vm.accelerator}, QEMU {version})")
    plugged = f"{len(layout.enabled)} of {counted(layout.max, 'vCPU')} plugged: {layout.enabled}{_pending(layout)}"
    apart = "  " if width is None or len(head) + 2 + len(plugged) <= width else "\n"
    return f"{head}{apart}{plugged}"


def vcpu_table(
    layout: Layout,
    *,
    width: int | None,
    since: Mapping[int, str] | None = None,
    room: int = _MOST_IN_TABLE,
    threads: "Mapping[int, QemuThread] | None" = None,
) -> list[Block]:
    """Return every vCPU as a table; where there are more than *room*, the free ones in a line below it.

    With *since* (by the first vCPU id of a slot: since when a removal is pending) that is shown instead of the QOM
    path, and what does not fit into *room* even so is only counted. A terminal narrower than ``WIDE`` gets fewer
    columns. Proofs have a column where any is known that is more than being present. *threads*, by vCPU id, have
    columns in place of the QOM path.
    """
    narrow = width is not None and width < WIDE
    proven = any(vcpu.proof not in (None, Proof.PRESENT) for vcpu in layout)
    tight = proven and not narrow and width is not None and width < _WIDEST
    fields = _fields(layout, since, narrow=narrow, tight=tight, proven=proven)
    if threads:
        fields = _with_threads(fields, threads, narrow=narrow)
    table = Table(*(_column(name, narrow=narrow or tight) for name, _ in fields), gap=1 if narrow or tight else 2)
    long = layout.max > room
    shown = [vcpu for vcpu in layout if vcpu.enabled or not long]
    cut = max(len(shown) - room + 2, 0) if since is not None and len(shown) > room else 0
    if cut:  # pending ones are kept: they are what people look for
        kept = sorted(shown, key=lambda vcpu: (not vcpu.pending, vcpu.id))[:-cut]
        shown = sorted(kept, key=lambda vcpu: vcpu.id)
    for vcpu in shown:
        table.add(*(_styled(name, printable(field(vcpu))) for name, field in fields), style=_row_style(vcpu))
    notes: list[Block] = [f"and {cut} more"] if cut else []
    notes += [Line(f"free: {layout.free}", style="dim")] if long and layout.free else []
    return [table, *notes]


def _styled(name: str, cell: str) -> Line:
    return Line((cell, _STYLES.get(cell, "") if name == "state" else ""))


def _row_style(vcpu: Vcpu) -> str:
    if not vcpu.enabled:
        return "dim"
    return "yellow" if vcpu.pending else ""


def _column(name: str, *, narrow: bool) -> Column:
    # The levels of a place, and on a narrow terminal the words of a name, stand below each other: it all fits.
    head = name.replace("/", "/\n").replace(" ", "\n" if narrow else " ")
    justify = "right" if name in _RIGHT else "center" if "/" in name else "left"
    return Column(head, justify, fold=name in ("device id", "QOM path", "host CPUs"))


def _fields(
    layout: Layout, since: Mapping[int, str] | None, *, narrow: bool, tight: bool, proven: bool
) -> list[_Field]:
    """Return what the columns show, each with its name; *tight* leaves some out, since proofs need the room."""
    props = layout.slots[0].props if layout.slots else {}
    levels = sorted((name for name in props if name != "node-id"), key=_depth)
    place = printable("/".join(name.removesuffix("-id") for name in levels)) or "place"
    fields: list[_Field] = [("id", lambda vcpu: str(vcpu.id))]
    if any(slot.count > 1 for slot in layout.slots) or (since is not None and not narrow):
        fields.append(("slot", lambda vcpu: str(vcpu.slot.first)))
    fields.append((place, lambda vcpu: "/".join(str(vcpu.props.get(name, "")) for name in levels)))
    if any("node-id" in slot.props for slot in layout.slots):
        fields.append(("node", lambda vcpu: str(vcpu.props.get("node-id", ""))))
    fields += [("state", _state), ("order", lambda vcpu: str(vcpu.order or ""))]
    if proven:
        fields.insert(-1, ("proof", _proof if since is None or narrow or tight else _proof_and_age))
    if proven and narrow:
        fields.pop()  # the order
    if not (since is None and tight) and not (since is not None and narrow):  # the QOM path ends with it
        fields.append(("device id", lambda vcpu: vcpu.device_id or ""))
    if since is None and not narrow:
        fields.append(("QOM path", lambda vcpu: vcpu.qom_path or ""))
    if not narrow and not (since is not None and tight):
        fields.append(("host tid", lambda vcpu: str(vcpu.host_tid or "")))
    if since is not None:
        fields.append(("pending since", lambda vcpu: since.get(vcpu.slot.first, "") if vcpu.pending else ""))
    return fields


def _with_threads(fields: list[_Field], threads: "Mapping[int, QemuThread]", *, narrow: bool) -> list[_Field]:
    """Return *fields* with those of *threads*, and without what leaves no room for them."""
    left_out = ("QOM path", "device id", "order") if narrow else ("QOM path",)

    def of_thread(show: "Callable[[QemuThread], str]") -> Callable[[Vcpu], str]:
        return lambda vcpu: show(threads[vcpu.id]) if vcpu.id in threads else ""

    return [
        *(field for field in fields if field[0] not in left_out),
        ("host CPUs", of_thread(lambda thread: _instead(thread.found.cpus, thread.wanted.cpus))),
        ("scheduler", of_thread(lambda thread: _instead(thread.found.scheduler, thread.wanted.scheduler))),
        ("last on", of_thread(lambda thread: "" if thread.host_cpu is None else str(thread.host_cpu))),
    ]


def _instead(found: object, wanted: object) -> str:
    """Return what was found, with what it is to be if that is something else."""
    return str(found or "") if wanted in (None, found) else f"{found or '?'}, not {wanted}"


def _depth(level: str) -> int:
    """Return how deep a level of the topology is; one that this version does not know is innermost."""
    return _LEVELS.index(level) if level in _LEVELS else len(_LEVELS)


def _proof(vcpu: Vcpu) -> str:
    return "" if vcpu.proof is None else vcpu.proof.value


def _proof_and_age(vcpu: Vcpu) -> str:
    return _proof(vcpu) + ("" if vcpu.proven_at is None else f" ({age(max(time.time() - vcpu.proven_at, 0))})")


def _state(vcpu: Vcpu) -> str:
    if not vcpu.enabled:
        return "free"
    if vcpu.pending:
        return "pending"
    return "plugged" if vcpu.hotpluggable else "fixed"
