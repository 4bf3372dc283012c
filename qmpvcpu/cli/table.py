"""The vCPUs of a VM as a table, for ``list`` and ``watch``: no wider than the terminal, and nothing cut. No I/O."""

from collections.abc import Callable, Mapping
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qmpvcpu.errors import printable
from qmpvcpu.model.layout import Layout, Vcpu

WIDE: Final = 78
"""Columns of a terminal that all of the table needs; a narrower one gets what fits into 40."""

# Longer tables name free vCPUs in one line instead.
_MOST_IN_TABLE: Final = 64
# QEMU names them in no particular order.
_LEVELS: Final = (
    *("drawer-id", "book-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id"),
)
_RIGHT: Final = ("id", "slot", "order", "node", "host tid")
_STYLES: Final = {"plugged": "green", "pending": "bold yellow"}

_Column = tuple[str, Callable[[Vcpu], str]]


def vcpu_table(
    layout: Layout,
    *,
    since: Mapping[int, str] | None = None,
    room: int = _MOST_IN_TABLE,
    narrow: bool = False,
) -> Group:
    """Return every vCPU as a table; where there are more than *room*, the free ones in a line below it.

    With *since* there is no QOM path, but since when a removal is pending, by the slot's first vCPU id; and what does
    not fit into *room* even so is only counted. *narrow* leaves the widest columns out.
    """
    columns = _columns(layout, since, narrow=narrow)
    table = Table(box=None, padding=(0, 1 if narrow else 2, 0, 0), pad_edge=False)
    for name, _ in columns:
        right, centered = name in _RIGHT, "/" in name
        # A place has one level below the other, and a name of two words a line for each: it all fits 80 columns.
        table.add_column(
            name.replace("/", "/\n").replace(" ", "\n" if narrow else " "),
            justify="right" if right else "center" if centered else "left",
            overflow="fold",
            no_wrap=name not in ("device id", "QOM path"),
        )
    long = layout.max > room
    shown = [vcpu for vcpu in layout if vcpu.enabled or not long]
    cut = max(len(shown) - room + 2, 0) if since is not None and len(shown) > room else 0
    if cut:  # what is pending is what is looked at
        shown = sorted(sorted(shown, key=lambda vcpu: (not vcpu.pending, vcpu.id))[:-cut], key=lambda vcpu: vcpu.id)
    for vcpu in shown:
        cells = (
            Text(printable(cell(vcpu)), _STYLES.get(_state(vcpu), "") if name == "state" else "")
            for name, cell in columns
        )
        table.add_row(*cells, style=_style(vcpu))
    notes = [Text(f"{cut} more are plugged")] if cut else []
    notes += [Text(f"free: {layout.free}", style="dim")] if long and layout.free else []
    return Group(table, *notes)


def _columns(layout: Layout, since: Mapping[int, str] | None, *, narrow: bool) -> list[_Column]:
    """Return the columns, each with what stands in it."""
    props = layout.slots[0].props if layout.slots else {}
    levels = sorted((name for name in props if name != "node-id"), key=_depth)
    place = printable("/".join(name.removesuffix("-id") for name in levels)) or "place"
    columns: list[_Column] = [("id", lambda vcpu: str(vcpu.id))]
    if any(slot.count > 1 for slot in layout.slots) or (since is not None and not narrow):
        columns.append(("slot", lambda vcpu: str(vcpu.slot.first)))
    columns.append((place, lambda vcpu: "/".join(str(vcpu.props.get(name, "")) for name in levels)))
    if any("node-id" in slot.props for slot in layout.slots):
        columns.append(("node", lambda vcpu: str(vcpu.props.get("node-id", ""))))
    columns += [("state", _state), ("order", lambda vcpu: str(vcpu.order or ""))]
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
