"""What QEMU's names look like: text from outside goes into a command or an argument only if it is of this shape.

None of them can hold a comma, an equals sign, a blank or a quote, which would begin another option or argument.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, TypeGuard

PERIPHERAL: Final = "/machine/peripheral/"
"""Where QEMU has the devices with an id."""

# The longest of each that QEMU has are a third of this.
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
_CPU_TYPE: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.+-]{0,120})-(?:[a-z0-9_]{1,16}-cpu|spapr-cpu-core)")
_MODEL_VERSION: Final = re.compile("-v[0-9]{1,3}$")
_DEVICE_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,255}")
_QOM_PATH: Final = re.compile(
    r"(?!/machine/peripheral/(?![A-Za-z][A-Za-z0-9._-]*(?:/|\Z)))(?:/[A-Za-z0-9_.:@+-]{1,256}(?:\[[0-9]{1,10}\])?){1,8}"
)
_LONGEST_PATH: Final = 2200
_PLACE: Final = re.compile(r"[a-z]{1,16}(?:-[a-z]{1,16}){0,3}-id")
KNOWN_PLACES: Final = frozenset(
    f"{level}-id" for level in ("node", "drawer", "book", "socket", "die", "cluster", "module", "core", "thread")
)
"""The names of places in every QEMU to 11.1."""
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@lru_cache(maxsize=16384)  # a VM's paths are the same at every read
def _fits_path(text: str) -> bool:
    return _QOM_PATH.fullmatch(text) is not None


def is_word(value: object) -> TypeGuard[str]:
    """Tell whether *value* can name a machine type, an architecture, a CPU model or a CPU feature."""
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def is_cpu_type(value: object) -> TypeGuard[str]:
    """Tell whether *value* can name a CPU's type: a model, and ``-x86_64-cpu``, ``-spapr-cpu-core`` or the like."""
    return isinstance(value, str) and _CPU_TYPE.fullmatch(value) is not None


def cpu_model_of(cpu_type: str) -> str | None:
    """Return the model of a CPU's type, as ``-cpu`` takes it; None if it is no CPU's type."""
    found = _CPU_TYPE.fullmatch(cpu_type)
    return found[1] if found else None


def is_same_model(named: str, running: str) -> bool:
    """Tell whether a VM started with the CPU model *named* may report *running*.

    A machine type decides which version of a model its plain name is, and QEMU which revision ``POWER9`` is.
    """
    if _MODEL_VERSION.sub("", named) == _MODEL_VERSION.sub("", running):
        return named == running or _MODEL_VERSION.search(named) is None or _MODEL_VERSION.search(running) is None
    return running.lower().startswith(f"{named.lower()}_v")


def is_device_id(value: object) -> TypeGuard[str]:
    """Tell whether *value* can be a device's id.

    Source: QEMU util/id.c, id_wellformed.
    """
    return isinstance(value, str) and _DEVICE_ID.fullmatch(value) is not None


def is_qom_path(value: object) -> TypeGuard[str]:
    """Tell whether *value* can be the absolute QOM path of a CPU, such as ``/machine/unattached/device[0]``.

    One of a device with an id has that id in it.
    """
    return isinstance(value, str) and len(value) <= _LONGEST_PATH and _fits_path(value)


def is_place(value: object) -> TypeGuard[str]:
    """Tell whether *value* can name a property that says where a CPU goes: ``socket-id``, ``core-id``, ...

    Source: QEMU qapi/machine.json, CpuInstanceProperties: each is a whole number, in every version to 11.1.
    """
    return isinstance(value, str) and _PLACE.fullmatch(value) is not None


def is_uuid(value: object) -> TypeGuard[str]:
    """Tell whether *value* is a uuid as QEMU prints it."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


class Shape(NamedTuple):
    """What a text, or another value, must look like: checked where it is read, before it goes anywhere.

    Attributes:
        what: What errors call such a value, such as ``"a QOM path"``.
        fits: Whether a value, of any type, is one.
    """

    what: str
    fits: Callable[[object], bool]


WORD: Final = Shape("a name of letters, digits, '_', '.', '+' and '-'", is_word)
CPU_TYPE: Final = Shape("a CPU's type", is_cpu_type)
DEVICE_ID: Final = Shape("a device id", is_device_id)
QOM_PATH: Final = Shape("a QOM path", is_qom_path)
UUID: Final = Shape("a uuid", is_uuid)
