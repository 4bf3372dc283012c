"""The fixtures that live on the test's event loop; they are pytest-asyncio's.

A test chooses the scope of its loop, a fixture is bound to one when it is defined. So each is made for every scope,
under a private name, and the public one takes that of the test.
"""

from typing import TYPE_CHECKING, Any, Final, Literal

import pytest
import pytest_asyncio

from qmpvcpu.testing.pytest_plugin import EVIDENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmpvcpu.testing.peer import ScriptedPeer
    from qmpvcpu.vm.controller import VcpuController

_Scope = Literal["function", "class", "module", "package", "session"]
_SCOPES: Final[tuple[_Scope, ...]] = ("function", "class", "module", "package", "session")


def _attached_on(scope: _Scope) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_qmpvcpu_vcpus_{scope}")
    async def attached(_qmpvcpu_vm: Any) -> "AsyncIterator[VcpuController]":
        from qmpvcpu.vm.attaching import attach

        # To the last socket, so that the first is free for what is tested.
        async with attach(_qmpvcpu_vm.sockets[-1], name=_qmpvcpu_vm.name) as controller:
            yield controller

    return attached


def _peer_on(scope: _Scope) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_qmpvcpu_peer_{scope}")
    async def peer(request: pytest.FixtureRequest) -> "AsyncIterator[ScriptedPeer]":
        from qmpvcpu.testing.peer import ScriptedPeer
        from qmpvcpu.testing.plugin.evidence import PeerEvidence
        from qmpvcpu.testing.plugin.options import options_of

        async with ScriptedPeer(**options_of(request.node, "scripted_qmp")) as peer:
            request.node.stash.setdefault(EVIDENCE, []).append(PeerEvidence(peer))
            yield peer

    return peer


globals().update({f"_{make.__name__}_{scope}": make(scope) for make in (_attached_on, _peer_on) for scope in _SCOPES})


@pytest.fixture
def _qmpvcpu_vm(request: pytest.FixtureRequest, qemu_binary: str | None) -> Any:  # noqa: ARG001 - runs with each
    """The VM that the test asks for: ``linux_vm`` if it names that one, else ``qemu_vm``."""
    names = set(request.node.fixturenames)
    return request.getfixturevalue("linux_vm" if "linux_vm" in names and "qemu_vm" not in names else "qemu_vm")


@pytest.fixture
def vcpus(request: pytest.FixtureRequest, _qmpvcpu_vm: Any) -> "VcpuController":
    """A controller attached to the test's VM: to ``linux_vm`` if the test asks for that, else to ``qemu_vm``.

    It uses the VM's last QMP socket: ``.qmp`` is free for what is tested.
    """
    if "anyio_backend" in request.node.fixturenames and not pytest_asyncio.is_async_test(request.node):
        pytest.fail(
            "vcpus lives on the loop of pytest-asyncio, this test on that of anyio: "
            "`async with qmpvcpu.attach(qemu_vm.qmp) as vcpus` does the same there",
            pytrace=False,
        )
    controller: VcpuController = request.getfixturevalue(f"_qmpvcpu_vcpus_{_loop_scope(request)}")
    return controller


@pytest.fixture
def scripted_qmp(request: pytest.FixtureRequest) -> "ScriptedPeer":
    """A QMP server that does what the test tells it to, as ``@pytest.mark.scripted_qmp(...)`` begins."""
    if not pytest_asyncio.is_async_test(request.node):
        pytest.fail("scripted_qmp answers on the loop of an async test, run by pytest-asyncio", pytrace=False)
    peer: ScriptedPeer = request.getfixturevalue(f"_qmpvcpu_peer_{_loop_scope(request)}")
    return peer


def _loop_scope(request: pytest.FixtureRequest) -> str:
    """The scope of the loop that the test runs on, by what pytest-asyncio documents of it."""
    marker = request.node.get_closest_marker("asyncio")
    scope: str | None = marker.kwargs.get("loop_scope") if marker is not None else None
    if scope is None:
        try:
            scope = request.config.getini("asyncio_default_test_loop_scope")
        except (KeyError, ValueError):  # pytest-asyncio before 0.25 has no such default
            scope = None
    return scope or "function"
