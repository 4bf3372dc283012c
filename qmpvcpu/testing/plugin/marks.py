"""What a test asks of its VM: the options of its markers and parameters, validated."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import pytest

from qmpvcpu.testing.rom import Behaviour

Options = dict[str, Any]

_REQUIREMENTS: Final = ("accel", "min_version")
_MACHINE: Final = ("machine", "boot", "max_vcpus", "topology", "extra_args", "qmp_sockets")
KNOWN: Final[Mapping[str, tuple[str, ...]]] = {
    "qemu_vm": (*_MACHINE, "behaviour", "ready_after_ms", "wait", "incoming", *_REQUIREMENTS),
    "linux_vm": (*_MACHINE, "memory_mib", "kernel", "kernel_options", "incoming", "timeout", *_REQUIREMENTS),
    "scripted_qmp": ("answers", "greeting", "tcp", "reject_others"),
}


def options_of(node: pytest.Item, fixture: str, given: object = None) -> Options:
    """The options of the markers named like *fixture*, the closest first, and over them those that were *given*.

    Args:
        node: The test.
        fixture: ``qemu_vm``, ``linux_vm`` or ``scripted_qmp``.
        given: A mapping of options; for ``qemu_vm`` also a behaviour, or several.

    Raises:
        pytest.fail.Exception: An option is unknown, or has a value that cannot be.
    """
    options: Options = {}
    for marker in reversed([*node.iter_markers(fixture)]):
        if marker.args:
            pytest.fail(f"@pytest.mark.{fixture} takes keywords only: {_listed(fixture)}", pytrace=False)
        options |= marker.kwargs
    options |= _as_options(fixture, given)
    for name in options:
        if name not in KNOWN[fixture]:
            close = difflib.get_close_matches(name, KNOWN[fixture], n=1)
            meant = f"; did you mean {close[0]}?" if close else "."
            pytest.fail(f"{fixture} has no option {name!r}{meant} It takes: {_listed(fixture)}", pytrace=False)
    _check_requirements(fixture, options)
    return options


def _as_options(fixture: str, given: object) -> Options:
    match given:
        case None:
            return {}
        case Mapping():
            return {**given}
        case Behaviour() if fixture == "qemu_vm":
            return {"behaviour": given}
        case Iterable() if fixture == "qemu_vm" and not isinstance(given, str):
            several = tuple(given)
            if all(isinstance(one, Behaviour) for one in several):
                return {"behaviour": several}
    kinds = "a dict of options, a Behaviour or several" if fixture == "qemu_vm" else "a dict of options"
    pytest.fail(f"the parameter of {fixture} is {given!r}, must be {kinds}", pytrace=False)


def _check_requirements(fixture: str, options: Options) -> None:
    accel = options.get("accel")
    if accel not in {None, "kvm", "tcg"}:
        pytest.fail(f"{fixture}(accel={accel!r}): must be 'kvm' or 'tcg'", pytrace=False)
    version = options.get("min_version")
    if version is not None and not re.fullmatch(r"\d+(\.\d+){0,2}", str(version)):
        pytest.fail(f"{fixture}(min_version={version!r}): must be as '10.0' or '10.0.2'", pytrace=False)


def _listed(fixture: str) -> str:
    return ", ".join(KNOWN[fixture])
