"""The evidence that a failed test has from its VMs: how QEMU ended, its log, the QMP transcript, serial ports."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from qmpvcpu.errors import counted, printable
from qmpvcpu.host.processes import read_stat
from qmpvcpu.testing.agent import ScriptedAgent
from qmpvcpu.testing.microguest import MicroGuest
from qmpvcpu.testing.peer import Line, ScriptedPeer
from qmpvcpu.testing.qemu import fate
from qmpvcpu.testing.vms import TRACE_FILE, QmpMessage, Vm, read_transcript

_TRANSCRIPT: Final = "QMP transcript"
_LINES: Final = 60  # of each section in a report; the files have all
_WIDTH: Final = 400


class Evidence(Protocol):
    """What a VM, or a scripted peer, shows when its test fails."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    def sections(self) -> Mapping[str, str]:
        """Titles and whole texts, in reading order, without empty ones."""
        ...


class PeerEvidence:
    """The evidence of a scripted peer."""

    def __init__(self, peer: ScriptedPeer) -> None:
        self.name = "scripted_qmp"
        self._peer = peer

    def sections(self) -> Mapping[str, str]:
        """What was said."""
        said = "\n".join(_line(line, "qmp") for line in self._peer.transcript)
        return {_TRANSCRIPT: said} if said else {}


class AgentEvidence:
    """The evidence of a scripted agent."""

    def __init__(self, agent: ScriptedAgent) -> None:
        self.name = "scripted_agent"
        self._agent = agent

    def sections(self) -> Mapping[str, str]:
        """What it was asked, and what it did."""
        changes = [f"CPU {number} {'online' if online else 'offline'}" for number, online in self._agent.changes]
        sections = {"asked": "\n".join(self._agent.received), "changed": "\n".join(changes)}
        return {title: text for title, text in sections.items() if text}


class VmEvidence:
    """The evidence of one VM; once the VM is gone, what was kept."""

    def __init__(self, vm: Vm[Any]) -> None:
        self._vm = vm
        self._kept: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self._vm.name

    def keep(self) -> None:
        """Read it all, for the VM's directory is about to go."""
        self._kept = self.sections()

    def sections(self) -> Mapping[str, str]:
        """How QEMU ended, and what it and its guest said."""
        if self._kept is not None:
            return self._kept
        process = self._vm.guest.process
        if process.returncode is None and ((known := read_stat(process.pid)) is None or known.is_ending):
            self._vm.wait_ended()
        trace = read_transcript(_text(process.directory / TRACE_FILE))
        guest = self._vm.guest
        said = _text(process.directory / "serial0.log")
        sections = {
            "QEMU": f"It {fate(process.pid, process.returncode)}.\n{' '.join(process.argv)}",
            "QEMU log": process.stderr,
            _TRANSCRIPT: "\n".join(_line(message, f"qmp{message.monitor}") for message in trace),
            "guest's console": _text(process.directory / "console"),
            "guest's agent": _text(process.directory / "agent.log"),
            "guest's serial port": guest.spelled_out(said) if isinstance(guest, MicroGuest) else said,
        }
        return {title: text for title, text in sections.items() if text.strip()}


def attach_evidence(
    nodeid: str, report: pytest.TestReport, evidence: Iterable[Evidence], *, artifacts: Path | None
) -> None:
    """Put the evidence of a failed test's VMs into its report, and all of it into files.

    Args:
        nodeid: The test's id, the name of its directory in *artifacts*.
        report: The report of the phase that failed.
        evidence: That of its VMs.
        artifacts: The directory for files; None: none are made.
    """
    for one in evidence:
        sections = one.sections()
        for title, text in sections.items():
            _add_section(report, f"{one.name}: {title}", "\n".join(_shortened(text, title)))
        if artifacts is not None:
            try:
                _keep(artifacts / _file_name(nodeid) / _file_name(one.name), sections)
            except OSError as why:
                _add_section(report, f"{one.name}: not kept", str(why))


def _keep(home: Path, sections: Mapping[str, str]) -> None:
    home.mkdir(parents=True, exist_ok=True)
    for title, text in sections.items():
        (home / f"{_file_name(title)}.txt").write_text(text + "\n")


def _add_section(report: pytest.TestReport, title: str, text: str) -> None:
    text = printable(text, lines=True)  # a console may clear the screen
    # As a part of the failure's text it is in every kind of report, junit's included, with any --capture.
    add = getattr(report.longrepr, "addsection", None)
    if add is not None:
        add(title, text, "-")
    else:
        report.sections.append((title, text))


def _line(said: QmpMessage | Line, monitor: str) -> str:
    at = datetime.fromtimestamp(said.at, tz=UTC).strftime("%H:%M:%S.%f")
    return f"{at} {monitor} {'->' if said.sender == 'client' else '<-'} {printable(str(said))}"


def _shortened(text: str, title: str) -> Iterator[str]:
    lines = text.splitlines()
    if len(lines) > _LINES:
        yield f"... {counted(len(lines) - _LINES, 'line')} before these: --qemu-artifacts=DIR keeps all"
    for line in lines[-_LINES:]:
        more = len(line) - _WIDTH
        yield f"{line[:_WIDTH]} ... {more} more" if more > 0 and title == _TRANSCRIPT else line


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-")
