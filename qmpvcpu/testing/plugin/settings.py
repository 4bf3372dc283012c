"""What the user chose: on the command line, in the environment, in the ini file, in this order."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

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
        missing: What becomes of a test that lacks QEMU, KVM or the Linux guest: ``fail`` or ``skip``.
    """

    accel: str
    missing: str

    @classmethod
    def of(cls, config: pytest.Config) -> "Settings":
        """The options of *config*.

        Raises:
            pytest.UsageError: A value from the environment or the ini file is none of its choices.
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
    """The QEMUs that the user named, paths or names in PATH; none: the best of the machine is to be found."""
    named: list[str] = config.getoption("qemu_binary") or []
    if not named:
        named = os.environ.get(ENVIRONMENT["qemu_binary"], "").split(os.pathsep)
    named = [name for name in named if name]
    return named or config.getini("qemu_binary")


def _value(config: pytest.Config, name: str) -> str:
    value: str = config.getoption(name) or os.environ.get(ENVIRONMENT[name]) or config.getini(name)
    choices = _CHOICES.get(name)
    if value and choices and value not in choices:
        raise pytest.UsageError(
            f"{name} is {value!r} (from {ENVIRONMENT[name]} or the ini file), must be one of {', '.join(choices)}"
        )
    return value
