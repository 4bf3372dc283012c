"""What the user chose for a session, and what a test asks of its VM.

A session's choices come from the command line, the environment or the ini file, in this order; a test's from its
markers and parameters.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from qmpvcpu.testing.rom import Behaviour

ENVIRONMENT: Final = {
    "qemu_binary": "QMPVCPU_QEMU",
    "qemu_accel": "QMPVCPU_ACCEL",
    "qemu_missing": "QMPVCPU_MISSING",
    "qemu_artifacts": "QMPVCPU_ARTIFACTS",
}
_CHOICES: Final = {"qemu_accel": ("auto", "kvm", "tcg"), "qemu_missing": ("fail", "skip")}


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a session.

    Attributes:
        accel: ``auto``, ``kvm`` or ``tcg``.
        missing: What to do with a test that lacks QEMU, KVM or the Linux guest: ``fail`` or ``skip``.
    """

    accel: str
    missing: str

    @classmethod
    def of(cls, config: pytest.Config) -> "Settings":
        """The options of *config*.

        Raises:
            pytest.fail.Exception: A value from the environment or the ini file is none of its choices.
        """
        return cls(
            accel=_value(config, "qemu_accel") or "auto",
            missing=_value(config, "qemu_missing") or "fail",
        )


def artifacts_directory(config: pytest.Config) -> Path | None:
    """Where the logs of failing tests are kept; None: nowhere."""
    named = _value(config, "qemu_artifacts")
    return config.invocation_params.dir / named if named else None


def chosen_binaries(config: pytest.Config) -> Sequence[str]:
    """The QEMUs that the user named, paths or names in PATH; none: find the best of the machine."""
    given: list[str] = config.getoption("qemu_binary") or [os.environ.get(ENVIRONMENT["qemu_binary"], "")]
    return _one_by_one(given) or _one_by_one(config.getini("qemu_binary"))


def _one_by_one(given: Iterable[str]) -> Sequence[str]:
    return [name for text in given for name in text.split(os.pathsep) if name]


def _value(config: pytest.Config, name: str) -> str:
    value: str = config.getoption(name) or os.environ.get(ENVIRONMENT[name]) or config.getini(name)
    choices = _CHOICES.get(name)
    if value and choices and value not in choices:
        where = f"{ENVIRONMENT[name]} or the ini file"
        pytest.fail(f"{name} is {value!r} (from {where}), must be one of {', '.join(choices)}", pytrace=False)
    return value


Options = dict[str, Any]

REQUIREMENTS: Final = ("accel", "min_version")
"""Options that choose where a test runs; the others say what its VM is."""
_MACHINE: Final = ("machine", "boot", "max_vcpus", "topology", "extra_args", "qmp_sockets")
KNOWN: Final[Mapping[str, tuple[str, ...]]] = {
    "qemu_vm": (*_MACHINE, "behaviour", "ready_after_ms", "wait", "incoming", *REQUIREMENTS),
    "linux_vm": (
        *(*_MACHINE, "memory_mib", "kernel", "kernel_options", "auto_online", "hypervisor", "incoming", "timeout"),
        *("agent_runs", "agent_blocks", *REQUIREMENTS),
    ),
    "agent": ("runs", "blocks"),
    "scripted_qmp": ("answers", "greeting", "tcp", "reject_others"),
    "scripted_agent": ("vcpus", "rule", "maximum", "onlines"),
}


def options_of(node: pytest.Item | pytest.Session, fixture: str, given: object = None) -> Options:
    """The options of the markers named like *fixture*, the closest first, and over them those that were *given*.

    Those of the marker ``agent`` are some of ``linux_vm``, under its own words.

    Args:
        node: The test, or the session, which has no markers.
        fixture: A fixture's name, or ``agent``.
        given: A mapping of options; for ``qemu_vm`` also a behaviour, or several.

    Raises:
        pytest.fail.Exception: An option is unknown, or has a value that cannot be.
    """
    options: Options = {}
    if fixture == "linux_vm":
        options |= {f"agent_{name}": value for name, value in options_of(node, "agent").items()}
    for marker in reversed([*node.iter_markers(fixture)]):
        if marker.args:
            pytest.fail(f"@pytest.mark.{fixture} takes keywords only: {_listed(fixture)}", pytrace=False)
        options |= marker.kwargs
    options |= _as_options(fixture, given)
    for name in options:
        if name not in KNOWN[fixture]:
            close = difflib.get_close_matches(str(name), KNOWN[fixture], n=1)
            meant = f"; did you mean {close[0]}?" if close else "."
            pytest.fail(f"{fixture} has no option {name!r}{meant} It takes: {_listed(fixture)}", pytrace=False)
    _check_values(fixture, options)
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


def _check_values(fixture: str, options: Options) -> None:
    arguments = options.get("extra_args")
    if isinstance(arguments, str):  # it would be taken letter by letter
        words = arguments.split()
        pytest.fail(f"{fixture}(extra_args={arguments!r}): must be a list, such as {words}", pytrace=False)
    accel = options.get("accel")
    if accel not in {None, "kvm", "tcg"}:
        pytest.fail(f"{fixture}(accel={accel!r}): must be 'kvm' or 'tcg'", pytrace=False)
    version = options.get("min_version")
    if version is not None and not re.fullmatch(r"\d+(\.\d+){0,2}", str(version)):
        pytest.fail(f"{fixture}(min_version={version!r}): must be as '10.0' or '10.0.2'", pytrace=False)


def _listed(fixture: str) -> str:
    return ", ".join(KNOWN[fixture])
