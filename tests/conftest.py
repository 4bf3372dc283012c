"""For all tests: where each may run, what may run at the same time, and what is said at the end."""

import asyncio
import signal

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from qmpvcpu.testing import best_qemu, probe_accelerator
from tests.figures import figures

# The time of an example on a busy machine says nothing. Everything else is hypothesis's default: in CI the same
# examples each time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Programs that tests start are told to end by it; a run in the background of a shell begins with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# With -n, tests of one group run one at a time: there is only one libvirtd, and tests that keep a CPU busy or depend
# on who is faster must not run at the same time. By path, since xdist 3.8 loses the marks of its own groups with
# pytest 9.2.
_GROUPS = {
    "tests/crash/": "heavy",
    "tests/fleet/test_hundred.py": "heavy",
    "tests/guest/": "heavy",
    "tests/libvirt/": "libvirt",
    "tests/metrics/test_hundred.py": "heavy",
    "tests/migration/test_a_vm_moves_with_its_holes.py": "heavy",
}


class _ByGroup(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands out groups whole, and all other tests one by one."""

    def _split_scope(self, nodeid: str) -> str:
        return next((group for path, group in _GROUPS.items() if nodeid.startswith(path)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Say which tests go to a process together."""
    return _ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs KVM where there is none."""
    marked = [item for item in items if item.get_closest_marker("kvm")]
    # Found out by running a guest, once, and only if a test wants to know.
    if marked and asyncio.run(probe_accelerator(best_qemu())) != "kvm":
        for item in marked:
            # tests/summary.py knows this reason.
            item.add_marker(pytest.mark.skip(reason="KVM runs no guest here"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was counted and measured."""
    for line in figures(terminalreporter):
        terminalreporter.write_line(line)
