"""What the fleet of a hundred came to, at the end of the run."""

import pytest

FIGURES = "fleet"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures."""
    lines: list[str] = [
        line
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == FIGURES and isinstance(value, list)
        for line in value
    ]
    for line in lines:
        terminalreporter.write_line(line)
