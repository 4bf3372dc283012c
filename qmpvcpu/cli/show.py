"""What people and programs see: map rows, the table of vCPUs, JSON shapes. No I/O."""

import enum
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qmpvcpu.cli.documents import SCHEMA, document
from qmpvcpu.errors import DomainXmlError, InvalidMapError, QmpVcpuError
from qmpvcpu.model import Layout, Vcpu, VcpuMap, as_json, verdict_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "SCHEMA",
    "document",
    "error_json",
    "headline",
    "in_options",
    "map_row",
    "milliseconds",
    "plain",
    "state_json",
    "state_text",
    "vcpu_table",
]

# Wider rows wrap on a terminal of 80 columns; ids with ranges say it shorter then.
_MOST_IN_ROW = 16
# Longer tables name free vCPUs in one line instead.
_MOST_IN_TABLE = 64
_SECOND = 1.0
_ARGUMENT = re.compile(r"\b(allow_fatal|allow_boot_vcpus|include_boot)=True\b")
# QEMU names them in no particular order.
_LEVELS = ("drawer-id", "book-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id")


def state_json(layout: Layout) -> dict[str, Any]:
    """Return the map in short."""
    return {"max": layout.max, "enabled": str(layout.enabled), "pending": str(layout.pending)}


def error_json(error: BaseException, message: str) -> dict[str, Any]:
    """Return *error* with all its evidence; ``verdict`` is the step's, or null where it is about no step."""
    if not isinstance(error, QmpVcpuError):
        return {"kind": type(error).__name__, "message": message, "outcome": "unchanged", "verdict": None}
    try:
        verdict = verdict_of(error)
    except InvalidMapError:  # it is about an id that no map can hold
        verdict = None
    evidence = {} if verdict is None else as_json(verdict)
    evidence.pop("seconds", None)  # the step's, not the error's
    evidence |= {name: plain(value) for name, value in vars(error).items() if not name.startswith("_")}
    for name in ("report", "outcome"):  # the one stands beside the error, whole; the other is below
        evidence.pop(name, None)
    if isinstance(error, DomainXmlError) and error.line is None:
        del evidence["line"]
    return {
        "kind": type(error).__name__,
        "message": message,
        "outcome": error.outcome.value,
        **({"verdict": None} | evidence),
    }


def plain(value: object) -> object:
    """Return *value* as JSON has it."""
    match value:
        case enum.Enum():
            return value.name
        case VcpuMap():
            return str(value)
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(each) for each in value]
        case None | bool() | int() | float() | str():
            return value
    return str(value)


def in_options(message: str) -> str:
    """Return *message* with what it says of Python's arguments said of options."""
    return _ARGUMENT.sub(lambda found: "--" + found[1].replace("_", "-"), message)


def state_text(layout: Layout) -> str:
    """Return the map, drawn and named."""
    pending = f", pending {layout.pending}" if layout.pending else ""
    return f"{map_row(layout)}  plugged {layout.enabled}{pending}"


def map_row(layout: Layout) -> str:
    """Return the map as a row of cells, such as ``[0][ ][ ][3]``; a pending removal is ``(3)``."""
    if layout.max > _MOST_IN_ROW:
        return f"{layout.enabled} of 0-{layout.max - 1}"
    width = len(str(layout.max - 1))
    return "".join(_cell(vcpu, width) for vcpu in layout)


def _cell(vcpu: Vcpu, width: int) -> str:
    if not vcpu.enabled:
        return f"[{'':{width}}]"
    return f"({vcpu.id:{width}})" if vcpu.pending else f"[{vcpu.id:{width}}]"


def milliseconds(seconds: float) -> str:
    """Return a duration as people read it."""
    if seconds >= _SECOND:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.1f} ms" if seconds < _SECOND / 10 else f"{seconds * 1000:.0f} ms"


def headline(layout: Layout) -> str:
    """Return the VM and its map in one line."""
    vm = layout.vm
    version = ".".join(map(str, vm.qemu_version))
    pending = f", pending {layout.pending}" if layout.pending else ""
    plugged = f"{len(layout.enabled)} of {layout.max} vCPUs plugged: {layout.enabled}"
    return f"{vm.name} ({vm.machine}, {vm.accelerator}, QEMU {version})  {plugged}{pending}"


def vcpu_table(
    layout: Layout,
    *,
    since: Mapping[int, str] | None = None,
    room: int = _MOST_IN_TABLE,
    narrow: bool = False,
) -> "Table":
    """Return every vCPU as a table; where there are more than *room*, the free ones in one row.

    With *since* there is no QOM path, but since when a removal is pending, by the slot's first vCPU id; and what does
    not fit into *room* even so is only counted. *narrow* leaves the widest columns out.
    """
    # Not at the top: what only makes documents does without rich, a third of what starting takes.
    from rich.table import Table  # noqa: PLC0415

    columns = _columns(layout, since, narrow=narrow)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, _ in columns:
        # One level below the other: the whole table fits 80 columns.
        right, centered = name in ("id", "order", "node", "host tid"), "/" in name
        table.add_column(
            name.replace("/", "/\n"),
            justify="right" if right else "center" if centered else "left",
            overflow="fold",
            min_width=max(map(len, name.split("/"))) if narrow else None,
        )
    long = layout.max > room
    shown = [vcpu for vcpu in layout if vcpu.enabled or not long]
    cut = max(len(shown) - room + 2, 0) if since is not None and len(shown) > room else 0
    if cut:  # what is pending is what is looked at
        shown = sorted(sorted(shown, key=lambda vcpu: (not vcpu.pending, vcpu.id))[:-cut], key=lambda vcpu: vcpu.id)
    for vcpu in shown:
        table.add_row(*(cell(vcpu) for _, cell in columns), style=_style(vcpu))
    if cut:
        table.add_row("", f"{cut} more")
    if long and layout.free:
        table.add_row("", f"free: {layout.free}", style="dim")
    return table


def _columns(
    layout: Layout, since: Mapping[int, str] | None, *, narrow: bool
) -> list[tuple[str, Callable[[Vcpu], str]]]:
    """Return the columns, each with what stands in it."""
    props = layout.slots[0].props if layout.slots else {}
    levels = sorted((name for name in props if name != "node-id"), key=_depth)
    place = "/".join(name.removesuffix("-id") for name in levels) or "place"
    columns: list[tuple[str, Callable[[Vcpu], str]]] = [
        ("id", lambda vcpu: str(vcpu.id)),
        ("state", _state),
        ("order", lambda vcpu: str(vcpu.order or "")),
        (place, lambda vcpu: "/".join(str(vcpu.props.get(name, "")) for name in levels)),
    ]
    if any("node-id" in slot.props for slot in layout.slots):
        columns.append(("node", lambda vcpu: str(vcpu.props.get("node-id", ""))))
    if since is None or not narrow:
        columns.append(("device id", lambda vcpu: vcpu.device_id or ""))
    if since is None and not narrow:
        columns.append(("QOM path", lambda vcpu: vcpu.qom_path or ""))
    if not narrow:
        columns.append(("host tid", lambda vcpu: str(vcpu.host_tid or "")))
    if since is not None:
        columns.append(("pending since", lambda vcpu: since.get(vcpu.slot.first, "") if vcpu.pending else ""))
    return columns


def _style(vcpu: Vcpu) -> str | None:
    if not vcpu.enabled:
        return "dim"
    return "yellow" if vcpu.pending else None


def _depth(level: str) -> int:
    """Return how deep a level of the topology is; one that this version does not know is innermost."""
    return _LEVELS.index(level) if level in _LEVELS else len(_LEVELS)


def _state(vcpu: Vcpu) -> str:
    if not vcpu.enabled:
        return "free"
    if vcpu.pending:
        return "pending"
    return "plugged" if vcpu.hotpluggable else "fixed"
