"""One libvirtd for all of these tests, and what the comparisons came to, at the end of the run."""

from collections.abc import Iterator

import pytest

from tests.libvirt.daemon import Libvirt, running_libvirtd

COMPARED = "domains compared with libvirt"
OPERATIONS = "live operations compared with libvirt"


@pytest.fixture(scope="session")
def _daemon() -> Iterator[Libvirt]:
    with running_libvirtd(log_monitors=True) as daemon:
        yield daemon


@pytest.fixture
def libvirt(_daemon: Libvirt) -> Iterator[Libvirt]:
    """The daemon, without any domain."""
    yield _daemon
    if not _daemon.answers():  # a test that stopped it failed before it started it again
        _daemon.start()
    _daemon.forget_all()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many generated domains and live operations were compared with libvirt, and how many differed."""
    if counts := list(recorded(terminalreporter, COMPARED)):
        taken, refused, differences = (sum(each) for each in zip(*counts, strict=True))
        terminalreporter.write_line(
            f"libvirt as the oracle: {taken + refused} domains compared ({taken} taken, {refused} refused), "
            f"{differences} unexplained differences"
        )
    if counts := list(recorded(terminalreporter, OPERATIONS)):
        operations, differences = (sum(each) for each in zip(*counts, strict=True))
        terminalreporter.write_line(
            f"libvirt as the oracle: {operations} live operations compared, {differences} unexplained differences"
        )


def recorded(reporter: pytest.TerminalReporter, name: str) -> Iterator[tuple[int, ...]]:
    """Each test's property of this name."""
    for reports in reporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                yield from (value for each, value in report.user_properties if each == name)  # type: ignore[misc]  # ours are tuples
