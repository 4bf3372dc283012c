"""One libvirtd for all of these tests, and what the comparisons came to, at the end of the run."""

from collections.abc import Iterator

import pytest

from tests.libvirt.daemon import Libvirt, running_libvirtd

COMPARED = "domains compared with libvirt"


@pytest.fixture(scope="session")
def _daemon() -> Iterator[Libvirt]:
    with running_libvirtd() as daemon:
        yield daemon


@pytest.fixture
def libvirt(_daemon: Libvirt) -> Iterator[Libvirt]:
    """The daemon, without any domain."""
    yield _daemon
    _daemon.forget_all()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many generated domains were compared with libvirt, and how many of them differed."""
    counts = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == COMPARED
    ]
    if counts:
        taken, refused, differences = (sum(each) for each in zip(*counts, strict=True))
        terminalreporter.write_line(
            f"libvirt as the oracle: {taken + refused} domains compared ({taken} taken, {refused} refused), "
            f"{differences} unexplained differences"
        )
