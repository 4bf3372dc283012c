"""What the matrices came to, at the end of the run."""

import pytest

KILLS = "kill matrix"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many points there were, and how many of them lost something."""
    counts = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == KILLS
    ]
    if counts:
        points, lost = (sum(each) for each in zip(*counts, strict=True))
        terminalreporter.write_line(f"kill matrix: {points} points, {lost} lost")
