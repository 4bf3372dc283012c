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

    from qmpvcpu.testing.agent import ScriptedAgent
    from qmpvcpu.testing.peer import ScriptedPeer
    from qmpvcpu.vm.controller import VcpuController
    from qmpvcpu.vm.guest import Guest

_Scope = Literal["function", "class", "module", "package", "session"]
_SCOPES: Final[tuple[_Scope, ...]] = ("function", "class", "module", "package", "session")


def _attached_on(scope: _Scope) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_qmpvcpu_vcpus_{scope}")
    async def attached(
        request: pytest.FixtureRequest, _qmpvcpu_vm: Any, _qmpvcpu_scripted: "ScriptedAgent | None"
    ) -> "AsyncIterator[VcpuController]":
        from qmpvcpu.testing.plugin.options import options_of
        from qmpvcpu.vm.attaching import attach

        scripted = _qmpvcpu_scripted
        agent = getattr(_qmpvcpu_vm, "agent", None) if scripted is None else scripted.path
        # To the last socket, so that the first is free for what is tested.
        async with attach(_qmpvcpu_vm.sockets[-1], name=_qmpvcpu_vm.name, agent=agent) as controller:
            if scripted is not None:
                if "vcpus" not in options_of(request.node, "scripted_agent"):
                    scripted.reboot(controller.layout.enabled)
                scripted.look = lambda: controller.layout.enabled
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


def _agent_on(scope: _Scope) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_qmpvcpu_agent_{scope}")
    async def agent(request: pytest.FixtureRequest) -> "AsyncIterator[ScriptedAgent]":
        from qmpvcpu.testing.agent import ScriptedAgent
        from qmpvcpu.testing.plugin.evidence import AgentEvidence
        from qmpvcpu.testing.plugin.options import options_of

        async with ScriptedAgent(**options_of(request.node, "scripted_agent")) as agent:
            request.node.stash.setdefault(EVIDENCE, []).append(AgentEvidence(agent))
            yield agent

    return agent


_MAKERS: Final = (_attached_on, _peer_on, _agent_on)
globals().update({f"_{make.__name__}_{scope}": make(scope) for make in _MAKERS for scope in _SCOPES})


@pytest.fixture
def _qmpvcpu_vm(request: pytest.FixtureRequest, qemu_binary: str | None) -> Any:  # noqa: ARG001 - runs with each
    """The VM that the test asks for: ``linux_vm`` if it names that one, or needs its agent, else ``qemu_vm``."""
    names = set(request.node.fixturenames)
    linux = "linux_vm" in names or ("guest_agent" in names and "scripted_agent" not in names)
    return request.getfixturevalue("linux_vm" if linux and "qemu_vm" not in names else "qemu_vm")


@pytest.fixture
def _qmpvcpu_scripted(request: pytest.FixtureRequest) -> "ScriptedAgent | None":
    """The scripted agent, if the test asks for one."""
    return request.getfixturevalue("scripted_agent") if "scripted_agent" in request.node.fixturenames else None


@pytest.fixture
def vcpus(request: pytest.FixtureRequest, _qmpvcpu_vm: Any) -> "VcpuController":
    """A controller attached to the test's VM: to ``linux_vm`` if the test asks for that, else to ``qemu_vm``.

    It uses the VM's last QMP socket: ``.qmp`` is free for what is tested. Its agent is ``scripted_agent`` if the test
    asks for that, else the one in ``linux_vm``.
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
def guest_agent(vcpus: "VcpuController") -> "Guest":
    """What the agent of the test's VM says and does: ``vcpus.guest``. The VM is ``linux_vm`` if none is named."""
    if not vcpus.guest.has_agent:
        pytest.fail("the micro-guest of qemu_vm has no agent: use linux_vm, or scripted_agent as well", pytrace=False)
    return vcpus.guest


@pytest.fixture
def scripted_qmp(request: pytest.FixtureRequest) -> "ScriptedPeer":
    """A QMP server that does what the test tells it to, as ``@pytest.mark.scripted_qmp(...)`` begins."""
    _check_async(request, "scripted_qmp")
    peer: ScriptedPeer = request.getfixturevalue(f"_qmpvcpu_peer_{_loop_scope(request)}")
    return peer


@pytest.fixture
def scripted_agent(request: pytest.FixtureRequest) -> "ScriptedAgent":
    """A guest agent that does what the test tells it to; it has the vCPUs of ``vcpus`` where the test uses that."""
    _check_async(request, "scripted_agent")
    agent: ScriptedAgent = request.getfixturevalue(f"_qmpvcpu_agent_{_loop_scope(request)}")
    return agent


def _check_async(request: pytest.FixtureRequest, name: str) -> None:
    if not pytest_asyncio.is_async_test(request.node):
        pytest.fail(f"{name} answers on the loop of an async test, run by pytest-asyncio", pytrace=False)


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
