"""What QEMU's names look like: text from outside goes into a command or an argument only if it is of this shape.

None of them can hold a comma, an equals sign, a blank or a quote, which would begin another option or argument.
"""

import re
from typing import Final, TypeGuard

__all__ = ["PERIPHERAL", "is_cpu_type", "is_device_id", "is_place", "is_qom_path", "is_uuid", "is_word"]

PERIPHERAL: Final = "/machine/peripheral/"
"""Where QEMU has the devices with an id."""

# The longest of each that QEMU has are a third of this.
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
_CPU_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,120}-(?:[a-z0-9_]{1,16}-cpu|spapr-cpu-core)")
_DEVICE_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,255}")
_QOM_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_.:@+-]{1,256}(?:\[[0-9]{1,10}\])?){1,16}")
_PLACE: Final = re.compile(r"[a-z]{1,16}(?:-[a-z]{1,16}){0,3}-id")
# Nearly all are one of these, and there are some for each vCPU at every read.
_KNOWN_PLACES: Final = frozenset(
    f"{level}-id" for level in ("node", "drawer", "book", "socket", "die", "cluster", "module", "core", "thread")
)
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def is_word(value: object) -> TypeGuard[str]:
    """Tell whether *value* can name a machine type, an architecture, a CPU model or a CPU feature."""
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def is_cpu_type(value: object) -> TypeGuard[str]:
    """Tell whether *value* can name a CPU's type: a model, and ``-x86_64-cpu``, ``-spapr-cpu-core`` or the like."""
    return isinstance(value, str) and _CPU_TYPE.fullmatch(value) is not None


def is_device_id(value: object) -> TypeGuard[str]:
    """Tell whether *value* can be a device's id.

    Source: QEMU util/id.c, id_wellformed.
    """
    return isinstance(value, str) and _DEVICE_ID.fullmatch(value) is not None


def is_qom_path(value: object) -> TypeGuard[str]:
    """Tell whether *value* can be the absolute QOM path of a CPU, such as ``/machine/unattached/device[0]``.

    One of a device with an id has that id in it.
    """
    if not isinstance(value, str) or _QOM_PATH.fullmatch(value) is None:
        return False
    return not value.startswith(PERIPHERAL) or is_device_id(value.removeprefix(PERIPHERAL).partition("/")[0])


def is_place(value: object) -> TypeGuard[str]:
    """Tell whether *value* can name a property that says where a CPU goes: ``socket-id``, ``core-id``, ...

    Source: QEMU qapi/machine.json, CpuInstanceProperties: each is a whole number, in every version to 11.1.
    """
    return value in _KNOWN_PLACES or (isinstance(value, str) and _PLACE.fullmatch(value) is not None)


def is_uuid(value: object) -> TypeGuard[str]:
    """Tell whether *value* is a uuid as QEMU prints it."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None
