"""What holds for every test: where KVM runs no guest, what needs it is skipped, with that reason."""

import asyncio

import pytest

from qmpvcpu.testing import best_qemu, probe_accelerator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Find out by running a guest, once, and only if a test wants to know."""
    marked = [item for item in items if item.get_closest_marker("kvm")]
    if marked and asyncio.run(probe_accelerator(best_qemu())) != "kvm":
        for item in marked:
            # tests/summary.py knows this reason.
            item.add_marker(pytest.mark.skip(reason="KVM runs no guest here"))
