"""What holds for every test: where it may run, what runs beside it, and what is told of it at the end."""

import asyncio

import pytest

from qmpvcpu.testing import best_qemu, probe_accelerator
from tests.figures import figures

# With -n, tests that bear one of these marks run one at a time: one libvirtd, and one Linux, which keeps a CPU busy.
_ONE_AT_A_TIME = ("libvirt", "guest")


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs KVM where there is none, and keep apart what must not run side by side."""
    marked = [item for item in items if item.get_closest_marker("kvm")]
    # Found out by running a guest, once, and only if a test wants to know.
    if marked and asyncio.run(probe_accelerator(best_qemu())) != "kvm":
        for item in marked:
            # tests/summary.py knows this reason.
            item.add_marker(pytest.mark.skip(reason="KVM runs no guest here"))
    for item in items:
        for name in _ONE_AT_A_TIME:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.xdist_group(name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was counted and measured."""
    for line in figures(terminalreporter):
        terminalreporter.write_line(line)
