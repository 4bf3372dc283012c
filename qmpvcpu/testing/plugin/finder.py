"""Which QEMU and which accelerator a VM gets, and what to say when they are missing."""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import pytest

from qmpvcpu.testing.linuxguest import LinuxGuestMissingError
from qmpvcpu.testing.plugin.options import Options, Settings
from qmpvcpu.testing.qemu import (
    Accelerator,
    QemuNotFoundError,
    best_qemu,
    probe_accelerator,
    qemu_named,
    qemu_version,
)
from qmpvcpu.testing.vms import Runner

T = TypeVar("T")

_HOW_TO_INSTALL: Final = (
    "Install one (Debian, Ubuntu: apt-get install qemu-system-x86; Fedora: dnf install qemu-system-x86-core), "
    "or name one with --qemu-binary or QMPVCPU_QEMU."
)


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU that was found.

    Attributes:
        path: Where it is.
        version: Such as ``"10.0.2"``.
    """

    path: Path
    version: str

    def is_at_least(self, version: str) -> bool:
        """Whether it is *version* or newer."""
        return _numbers(self.version) >= _numbers(version)


class QemuFinder:
    """Finds once in a session which QEMUs there are, and what they run under.

    Args:
        settings: What the user chose.
        runner: Runs the guest that tells whether KVM works.
        shared: A file in which the processes of one session (pytest-xdist) share what they found; None: one process.
    """

    def __init__(self, settings: Settings, runner: Runner, shared: Path | None) -> None:
        self._settings = settings
        self._runner = runner
        self._shared = shared
        self._qemus: dict[str | None, Qemu] = {}
        self._probed: dict[str, Accelerator] = {}
        self._linux_runs_under: dict[Path, Accelerator] = {}

    def qemu(self, named: str | None) -> Qemu:
        """The QEMU that was named, or the best of the machine."""
        if named not in self._qemus:
            self._qemus[named] = self._find(named)
        return self._qemus[named]

    def accelerator(self, qemu: Qemu, options: Options) -> Accelerator:
        """What a VM of *qemu* runs under; skips a test that asks for what the user's choice excludes."""
        wanted: Accelerator | None = options.get("accel")
        least = str(options.get("min_version", "0"))
        if not qemu.is_at_least(least):
            pytest.skip(f"needs QEMU {least}, {qemu.path} is {qemu.version}")
        chosen = self._settings.accel
        if wanted is not None and chosen not in {"auto", wanted}:
            pytest.skip(f"needs {wanted}, and {chosen} was chosen")
        if "tcg" in {wanted, chosen}:
            return "tcg"
        found = self._probe(qemu)
        if found != "kvm" and "kvm" in {wanted, chosen}:
            self._missing(
                f"KVM was asked for, and runs no guest of {qemu.path} here. /dev/kvm must exist and be open to you "
                "(group kvm), and the machine, if it is itself a VM, must have nested virtualisation. Without it, "
                "--qemu-accel=auto or tcg."
            )
        return found

    def linux_accelerator(self, qemu: Qemu, options: Options) -> Accelerator | None:
        """The same for Linux; None: only booting it tells. Some KVMs run the micro-guest and no Linux."""
        found = self.accelerator(qemu, options)
        if found == "kvm" and options.get("accel") != "kvm" and self._settings.accel == "auto":
            return self._linux_runs_under.get(qemu.path)
        return found

    def linux_ran_under(self, qemu: Qemu, accelerator: Accelerator) -> None:
        """Remember what a Linux was found to run under."""
        self._linux_runs_under.setdefault(qemu.path, accelerator)

    def available(self, take: Callable[[], T], how_to_install: str = "") -> T:
        """Return what *take* returns; where it lacks QEMU or the Linux guest, fail the test or skip it."""
        try:
            taken = take()
        except (QemuNotFoundError, LinuxGuestMissingError) as why:
            reason = f"{why}. {how_to_install}".rstrip()
        else:
            return taken
        return self._missing(reason)  # outside of the handler: the report shows the reason, not how it was found

    def _missing(self, why: str) -> NoReturn:
        """Fail the test, or skip it, as the user chose."""
        if self._settings.missing == "skip":
            pytest.skip(why)
        pytest.fail(f"{why}\n--qemu-missing=skip skips such tests.", pytrace=False)

    def _find(self, named: str | None) -> Qemu:
        def find() -> Qemu:
            found = best_qemu() if named is None else qemu_named(named)
            if found is None:
                raise QemuNotFoundError(f"there is no QEMU {named}")
            version = qemu_version(found)
            if version is None:
                raise QemuNotFoundError(f"{found} is not a QEMU: it does not answer --version")
            return Qemu(found, version)

        return self.available(find, _HOW_TO_INSTALL)

    def _probe(self, qemu: Qemu) -> Accelerator:
        key = str(qemu.path)
        if key not in self._probed:
            with self._sharing() as known:
                if key not in known:
                    known[key] = self._runner.run(probe_accelerator(qemu.path))
                self._probed |= known
        return self._probed[key]

    @contextlib.contextmanager
    def _sharing(self) -> Iterator[dict[str, Accelerator]]:
        """What this session's processes know; one at a time, so that only one of them finds out."""
        if self._shared is None:
            yield self._probed
            return
        with self._shared.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known: Mapping[str, Accelerator] = json.loads(file.read() or "{}")
            mine = {**known}
            yield mine
            if mine != known:
                file.truncate(0)
                json.dump(mine, file)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
