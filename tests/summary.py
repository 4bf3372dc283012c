# ruff: noqa: T201 - printing is what it does
"""Counts what a run of the tests came to, and decides what a skip means."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

# A skip with one of these reasons is no failure in CI. Each says what the machine lacks that nothing can install.
JUSTIFIED = {
    "KVM runs no guest here": "a host without nested virtualisation has none; the same tests run under TCG",
    "only root may do this": "it needs another user's threads, a cgroup or a mount of its own",
    "no network namespaces here": "they take root; what needs no cut cable is tested on the loopback too",
    "this host has one CPU": "all threads run on it, so that none can be anywhere else",
    "no cgroup v1 here": "a system has version 1 or 2; what is read of both is tested without it too",
}


@dataclasses.dataclass(frozen=True)
class Skip:
    """A test that did not run, and the reason that it gave."""

    test: str
    reason: str

    @property
    def justified(self) -> bool:
        """It is on the list."""
        return self.reason in JUSTIFIED


@dataclasses.dataclass(frozen=True)
class Results:
    """What pytest's own report says; an error in a fixture is a failure."""

    passed: int
    failed: int
    skips: tuple[Skip, ...]


def read_junit(path: Path) -> Results:
    """The results in a junit file; none at all if pytest ended before it wrote one."""
    if not path.exists():
        return Results(0, 0, ())
    passed = failed = 0
    skips = []
    for case in ET.parse(path).iter("testcase"):  # noqa: S314 - our own pytest wrote it a moment ago
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif skipped is not None:
            skips.append(Skip(f"{case.get('classname')}::{case.get('name')}", skipped.get("message", "")))
        else:
            passed += 1
    return Results(passed, failed, tuple(skips))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the skips with their reasons and the counts; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--junit", type=Path, required=True)
    parser.add_argument("--pytest-status", type=int, required=True)
    parser.add_argument("--checks-passed", type=int, default=0)
    parser.add_argument("--check-failed", action="append", default=[])
    options = parser.parse_args(arguments)

    results = read_junit(options.junit)
    failed = results.failed + len(options.check_failed)
    for check in options.check_failed:
        print(f"failed: {check}")
    if options.pytest_status and not results.failed:
        # It found no test, broke, or missed the wanted coverage: nothing in the report says so.
        print(f"failed: pytest ended with {options.pytest_status}")
        failed += 1
    strict = os.environ.get("CI") == "true"
    skipped = 0
    for skip in results.skips:
        fails = strict and not skip.justified
        print(f"{'failed, for it was ' if fails else ''}skipped: {skip.test}: {skip.reason}")
        failed += fails
        skipped += not fails
    for reason in sorted({skip.reason for skip in results.skips if skip.justified}):
        print(f"justified: {reason}: {JUSTIFIED[reason]}")
    print(f"{results.passed + options.checks_passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
