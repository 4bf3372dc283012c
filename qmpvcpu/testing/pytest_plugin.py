"""The pytest plugin: real QEMUs as fixtures. docs/testing.md is its manual.

Every pytest of an environment that has qmpvcpu loads this module, so it imports nothing but pytest; the rest comes
with the first test that uses a fixture.
"""

import contextlib
import inspect
import os
import shlex
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    import pluggy

    from qmpvcpu.testing.plugin.evidence import Evidence
    from qmpvcpu.testing.plugin.host import Test, VmHost
    from qmpvcpu.testing.vms import LinuxVm, LinuxVmFactory, QemuVm, QemuVmFactory, SharedVms


EVIDENCE: "pytest.StashKey[list[Evidence]]" = pytest.StashKey()
"""The evidence of a test's VMs, in case it fails; kept with the test, or with the session whose tests share them."""

_VM = "topology=None, extra_args=(), qmp_sockets=2, incoming=False, accel=None, min_version=None"
_MARKERS = {
    "qemu_vm": f"*, machine='q35', boot=1, max_vcpus=8, behaviour=(), ready_after_ms=0, wait=True, {_VM}",
    "linux_vm": "*, machine='q35', boot=2, max_vcpus=8, memory_mib=256, kernel=None, kernel_options='', timeout=60, "
    f"auto_online=True, hypervisor=True, agent_runs=True, agent_blocks=(), {_VM}",
    "agent": "*, runs=True, blocks=()",
    "scripted_qmp": "*, answers=None, greeting=GREETING, tcp=False, reject_others=False",
    "scripted_agent": "*, vcpus=those of the VM, rule='fixed', maximum=8, onlines=False",
}
_GIVES = {"agent": "linux_vm"}
"""The fixture that a marker is for, where that has another name."""
_TAKE_PATHS = ("--qemu-binary", "--qemu-artifacts")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options and what may stand in the ini file."""
    group = parser.getgroup("qmpvcpu", "real QEMUs for tests (qmpvcpu)")
    group.addoption(
        "--qemu-binary",
        action="append",
        metavar="QEMU",
        help="QEMU to test with, a path or a name in PATH, after an equals sign; with several (repeat the option, "
        "or put colons between), each test runs with each. Also QMPVCPU_QEMU. Default: the newest found",
    )
    group.addoption(
        "--qemu-accel",
        choices=("auto", "kvm", "tcg"),
        help="accelerator; auto, the default, is KVM where it runs a guest, else TCG. Also QMPVCPU_ACCEL",
    )
    group.addoption(
        "--qemu-missing",
        choices=("fail", "skip"),
        help="what to do with tests that lack QEMU, KVM or the Linux guest. Default: fail. Also QMPVCPU_MISSING",
    )
    group.addoption(
        "--qemu-artifacts",
        metavar="DIR",
        help="directory that keeps the whole logs and QMP transcripts of failing tests. Also QMPVCPU_ARTIFACTS",
    )
    parser.addini("qemu_binary", "as --qemu-binary, one per line", type="linelist", default=[])
    parser.addini("qemu_accel", "as --qemu-accel", default="")
    parser.addini("qemu_missing", "as --qemu-missing", default="")
    parser.addini("qemu_artifacts", "as --qemu-artifacts", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and the fixtures that need the event loop of the test.

    Raises:
        pytest.UsageError: An option and its path are two words.
    """
    _refuse_paths_after_a_space(config)
    for name, options in _MARKERS.items():
        fixture = _GIVES.get(name, name)
        config.addinivalue_line("markers", f"{name}({options}): what the fixture {fixture} gives (qmpvcpu)")
    if _has_pytest_asyncio(config):
        config.pluginmanager.import_plugin("qmpvcpu.testing.plugin.async_fixtures")
    else:
        config.pluginmanager.register(_NoAsyncFixtures(), "qmpvcpu-no-async-fixtures")


def _refuse_paths_after_a_space(config: pytest.Config) -> None:
    """Pytest looks for its ini file before it knows our options: it takes a path of its own for that of a test."""
    given = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *map(str, config.invocation_params.args)]
    for option in _TAKE_PATHS:
        if option in given:
            raise pytest.UsageError(
                f"write {option}=PATH: after a space, pytest takes the path for that of a test, looks for its "
                "ini file there, and loses yours"
            )


def _missing(name: str) -> Any:
    """A fixture that fails with what it needs."""

    @pytest.fixture(name=name)
    def missing(_self: object) -> None:
        need = "runs on the test's event loop and needs pytest-asyncio 0.24: pip install 'qmpvcpu[pytest]'"
        pytest.fail(f"the fixture {name} {need}", pytrace=False)

    return missing


class _NoAsyncFixtures:
    """The fixtures that need pytest-asyncio, where it is missing or too old."""

    vcpus = _missing("vcpus")
    guest_agent = _missing("guest_agent")
    scripted_qmp = _missing("scripted_qmp")
    scripted_agent = _missing("scripted_agent")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses a QEMU with each, if the user named several."""
    if "qemu_binary" not in metafunc.fixturenames:
        return
    from qmpvcpu.testing.plugin.options import chosen_binaries

    named = chosen_binaries(metafunc.config)
    if len(named) > 1:
        metafunc.parametrize("qemu_binary", named, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose marker changes nothing, since its VM is shared: it would test something else than it says."""
    fixtures = getattr(item, "fixturenames", ())
    if "shared_vms" not in fixtures:
        return
    for name in ("qemu_vm", "linux_vm", "agent"):
        vm = _GIVES.get(name, name)
        if f"{vm}_factory" not in fixtures and any(marker.name == name for marker in item.own_markers):
            pytest.fail(
                f"@pytest.mark.{name}(...) changes nothing here, since the test's VM is shared: give the options to "
                f"shared_vms.{vm}(...), or let the test start a VM of its own with {vm}_factory()",
                pytrace=False,
            )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> "Generator[None, pluggy.Result[pytest.TestReport], None]":
    """Put the evidence of a failed test's VMs into its report, once."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and (evidence := _evidence_of(item)):
        from qmpvcpu.testing.plugin.evidence import attach_evidence
        from qmpvcpu.testing.plugin.options import artifacts_directory

        attach_evidence(item.nodeid, report, evidence, artifacts=artifacts_directory(item.config))
    if report.failed or report.when == "teardown":
        # pytest keeps the items, and so what their VMs have said, until the session ends.
        item.stash.get(EVIDENCE, []).clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> "Generator[None, pluggy.Result[object], None]":
    """Report an interrupted test as failed, if it has VMs: they still run, and can show why it hangs."""
    outcome = yield
    if not isinstance(outcome.exception, KeyboardInterrupt) or not _evidence_of(item):
        return
    interrupt = outcome.exception

    def interrupted() -> None:
        raise interrupt

    call = pytest.CallInfo.from_call(interrupted, "call")
    report = item.ihook.pytest_runtest_makereport(item=item, call=call)
    with contextlib.suppress(OSError):  # a process of pytest-xdist may have lost the one that it reports to
        item.ihook.pytest_runtest_logreport(report=report)


@pytest.fixture(scope="session")
def qemu_binary(request: pytest.FixtureRequest) -> str | None:
    """The QEMU that the user named, one after the other if several; None: take the best of the machine."""
    from qmpvcpu.testing.plugin.options import chosen_binaries

    named: str | None = getattr(request, "param", None)
    return named or next(iter(chosen_binaries(request.config)), None)


@pytest.fixture(scope="session")
def _qmpvcpu_host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[VmHost]":
    """The session's VMs run here."""
    from qmpvcpu.testing.plugin.host import hosting
    from qmpvcpu.testing.plugin.options import Settings

    shared: Path | None = None
    if hasattr(request.config, "workerinput"):  # pytest-xdist's workers share the parent of their directories
        shared = tmp_path_factory.getbasetemp().parent / "qmpvcpu-accelerators.json"
    with hosting(Settings.of(request.config), shared) as host:
        yield host


@pytest.fixture
def qemu_vm_factory(
    request: pytest.FixtureRequest, qemu_binary: str | None, _qmpvcpu_host: "VmHost"
) -> "Iterator[QemuVmFactory]":
    """A function that starts VMs with the micro-guest: ``qemu_vm_factory(boot=2)``. They end with the test."""
    with _qmpvcpu_host.qemu_vms(_test(request, qemu_binary)) as start:
        yield start


@pytest.fixture
def qemu_vm(request: pytest.FixtureRequest, qemu_vm_factory: Any) -> "QemuVm":
    """A QEMU with the micro-guest, as ``@pytest.mark.qemu_vm(...)`` and an indirect parameter say."""
    vm: QemuVm = qemu_vm_factory(getattr(request, "param", None))
    return vm


@pytest.fixture
def linux_vm_factory(
    request: pytest.FixtureRequest, qemu_binary: str | None, _qmpvcpu_host: "VmHost"
) -> "Iterator[LinuxVmFactory]":
    """A function that starts VMs with Linux: ``linux_vm_factory(boot=1)``. They end with the test."""
    with _qmpvcpu_host.linux_vms(_test(request, qemu_binary)) as start:
        yield start


@pytest.fixture
def linux_vm(request: pytest.FixtureRequest, linux_vm_factory: Any) -> "LinuxVm":
    """A QEMU with a small real Linux, as ``@pytest.mark.linux_vm(...)`` and an indirect parameter say."""
    vm: LinuxVm = linux_vm_factory(getattr(request, "param", None))
    return vm


@pytest.fixture(scope="session")
def shared_vms(request: pytest.FixtureRequest, qemu_binary: str | None, _qmpvcpu_host: "VmHost") -> "SharedVms":
    """VMs for a fixture of yours, of any scope: ``with shared_vms.linux_vm(boot=1) as vm: yield vm``."""
    from qmpvcpu.testing.plugin.host import HostedVms

    return HostedVms(_qmpvcpu_host, _test(request, qemu_binary))


def _evidence_of(item: pytest.Item) -> "list[Evidence]":
    """The evidence of a test's own VMs, and of those that it shares with others."""
    own = item.stash.get(EVIDENCE, [])
    shared = item.session.stash.get(EVIDENCE, []) if "shared_vms" in getattr(item, "fixturenames", ()) else []
    return [*own, *shared]


def _test(request: pytest.FixtureRequest, qemu: str | None) -> "Test":
    from qmpvcpu.testing.plugin.host import Test

    return Test(request.node, qemu, request.node.stash.setdefault(EVIDENCE, []))


def _has_pytest_asyncio(config: pytest.Config) -> bool:
    """Whether a pytest-asyncio is loaded that lets a fixture choose its loop (0.24); an older one may stay."""
    if not any(map(config.pluginmanager.hasplugin, ("asyncio", "pytest_asyncio", "pytest_asyncio.plugin"))):
        return False
    import pytest_asyncio

    return "loop_scope" in inspect.signature(pytest_asyncio.fixture).parameters
