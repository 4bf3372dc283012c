"""What tests counted and measured, for the end of the run.

Each test records it as a property of its own, so that it comes through from wherever the test has run. The hooks that
print it stand in tests/conftest.py: with ``-n`` the process that prints collects nothing, and reads no other.
"""

from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["CAMPAIGNS", "COMPARED", "FLEET", "HOMES", "KILLS", "OPERATIONS", "WISHES_KEPT", "figures"]

KILLS = "kill matrix"  # points, how many of them lost something
HOMES = "kill matrix, QEMU's main thread"  # kills, after how many it was not where it belongs
CAMPAIGNS = "kill matrix, campaigns"  # points, VMs that were lost, VMs that were begun twice
WISHES_KEPT = "kill matrix, wishes"  # what happened, points, wishes that were lost, those that were carried out twice
COMPARED = "domains compared with libvirt"  # taken, refused, differences
OPERATIONS = "live operations compared with libvirt"  # operations, differences
FLEET = "fleet"  # lines


def figures(reporter: pytest.TerminalReporter) -> Iterator[str]:
    """Return lines that say what was counted, and what was measured."""
    if counts := _recorded(reporter, KILLS):
        points, lost = _sums(counts)
        yield f"kill matrix: {points} points, {lost} lost"
    if counts := _recorded(reporter, HOMES):
        kills, astray = _sums(counts)
        yield f"kill matrix: QEMU's main thread was where it belongs after {kills - astray} of {kills} kills"
    if counts := _recorded(reporter, CAMPAIGNS):
        points, lost, twice = _sums(counts)
        yield f"kill matrix: a campaign's controller killed at {points} points, {lost} VMs lost, {twice} begun twice"
    for what, points, lost, twice in _recorded(reporter, WISHES_KEPT):
        yield f"kill matrix: {what} at {points} points, {lost} wishes lost, {twice} carried out twice"
    if counts := _recorded(reporter, COMPARED):
        taken, refused, differences = _sums(counts)
        yield (
            f"libvirt as the oracle: {taken + refused} domains compared ({taken} taken, {refused} refused), "
            f"{differences} unexplained differences"
        )
    if counts := _recorded(reporter, OPERATIONS):
        operations, differences = _sums(counts)
        yield f"libvirt as the oracle: {operations} live operations compared, {differences} unexplained differences"
    for lines in _recorded(reporter, FLEET):
        yield from lines


def _recorded(reporter: pytest.TerminalReporter, name: str) -> list[Any]:
    """Return what the tests recorded under *name*."""
    return [
        value
        for reports in reporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for each, value in report.user_properties
        if each == name
    ]


def _sums(counts: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sum(each) for each in zip(*counts, strict=True))
