"""What people and programs see: map rows, JSON shapes. No I/O, and nothing that takes long to import."""

import enum
import re
from collections.abc import Mapping
from typing import Any

from qmpvcpu.errors import DomainXmlError, InvalidMapError, MonitorConnectError, QmpVcpuError, printable
from qmpvcpu.model.layout import Layout, Vcpu
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import as_json, verdict_of

# Wider rows wrap on a terminal of 80 columns; ids with ranges say it shorter then.
_MOST_IN_ROW = 16
_SECOND = 1.0
_ARGUMENT = re.compile(r"\b(allow_fatal|allow_boot_vcpus|include_boot)=True\b")


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
    """Return *message* with what it says of Python's calls and arguments said of commands and options."""
    message = message.replace("take_back(destination_is_gone=True)", "qmpvcpu take-back --destination-is-gone")
    return _ARGUMENT.sub(lambda found: "--" + found[1].replace("_", "-"), message)


def is_held(error: BaseException) -> bool:
    """Return True where another client most likely holds the QMP socket; not where its QEMU is stopped."""
    return isinstance(error, MonitorConnectError) and "second -qmp" in error.hint


def state_text(layout: Layout) -> str:
    """Return the map, drawn and named."""
    if layout.max > _MOST_IN_ROW:
        return f"plugged {map_row(layout)}"
    return f"{map_row(layout)}  plugged {layout.enabled}{_pending(layout)}"


def map_row(layout: Layout) -> str:
    """Return the map as a row of cells, ``[0][ ][ ][3]``, a pending removal as ``(3)``; a long one in words."""
    if layout.max > _MOST_IN_ROW:
        return f"{layout.enabled} of 0-{layout.max - 1}{_pending(layout)}"
    width = len(str(layout.max - 1))
    return "".join(_cell(vcpu, width) for vcpu in layout)


def _pending(layout: Layout) -> str:
    return f", pending {layout.pending}" if layout.pending else ""


def _cell(vcpu: Vcpu, width: int) -> str:
    if not vcpu.enabled:
        return f"[{'':{width}}]"
    return f"({vcpu.id:{width}})" if vcpu.pending else f"[{vcpu.id:{width}}]"


def milliseconds(seconds: float) -> str:
    """Return a duration as people read it."""
    if seconds >= _SECOND:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.1f} ms" if seconds < _SECOND / 10 else f"{seconds * 1000:.0f} ms"


def headline(layout: Layout, width: int | None = None) -> str:
    """Return the VM and its map in one line; in two if they are longer than *width*."""
    vm = layout.vm
    version = ".".join(map(str, vm.qemu_version))
    head = printable(f"{vm.name} ({vm.machine}, {vm.accelerator}, QEMU {version})")
    plugged = f"{len(layout.enabled)} of {layout.max} vCPUs plugged: {layout.enabled}{_pending(layout)}"
    apart = "  " if width is None or len(head) + 2 + len(plugged) <= width else "\n"
    return f"{head}{apart}{plugged}"
