"""What tests are given, and how they ask for it: one session in auto mode, one in strict mode on two processes."""

from pathlib import Path

import pytest

from tests.plugin.sessions import AUTO, STRICT, run, write

PASSING = """
    import asyncio
    import subprocess

    import pytest

    import qmpvcpu
    from qmpvcpu.testing import Behaviour, QemuVm

    pytestmark = pytest.mark.qemu_vm(max_vcpus=4, boot=2)


    @pytest.mark.asyncio
    @pytest.mark.qemu_vm(behaviour=Behaviour.refusing(0x82).for_slot(2))
    async def test_the_guest_refuses_until_told_otherwise(qemu_vm, vcpus):
        await vcpus.plug(2)
        with pytest.raises(qmpvcpu.UnplugRefusedError) as refused:
            await vcpus.unplug(2)
        assert refused.value.code == 0x82
        qemu_vm.comply()
        await vcpus.unplug(2)
        qemu_vm.refuse(0x81, slot=1)
        with pytest.raises(qmpvcpu.UnplugRefusedError):
            await vcpus.unplug(1)


    @pytest.mark.asyncio
    async def test_the_first_socket_is_free_beside_the_controller(qemu_vm, vcpus):
        async with qmpvcpu.attach(qemu_vm.qmp) as mine:
            await mine.plug(3)
            await vcpus.wait_for(lambda layout: 3 in layout.enabled)
        added = [said for said in qemu_vm.transcript if said.content.get("execute") == "device_add"]
        assert [said.content["arguments"]["id"] for said in added] == ["vcpu3"]


    def test_a_plain_test_drives_a_program(qemu_vm):
        done = subprocess.run(["qmpvcpu", "plug", "2", "--qmp", str(qemu_vm.qmp)], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert qemu_vm.transcript[-1].sender == "qemu"
        qemu_vm.scan_slots()


    def test_each_vm_of_a_factory_is_another(qemu_vm_factory):
        one, two = qemu_vm_factory(boot=3), qemu_vm_factory(machine="pc")
        assert one.pid != two.pid
        assert "maxcpus=4" in " ".join(one.guest.process.argv)
        assert "pc" in two.guest.process.argv
        two.kill()
        assert two.wait_ended() == -9
        assert one.returncode is None


    @pytest.mark.asyncio
    @pytest.mark.parametrize("qemu_vm", [Behaviour.silent(), [Behaviour.silent()], {"boot": 4}], indirect=True)
    async def test_a_parameter_goes_over_the_markers(qemu_vm, vcpus):
        assert isinstance(qemu_vm, QemuVm)
        assert vcpus.layout.max == 4
        if len(vcpus.layout.enabled) < 4:
            await vcpus.plug(3)
            request = await vcpus.request_unplug(3)
            assert not (await request.wait(0)).acknowledged


    @pytest.mark.asyncio(loop_scope="module")
    class TestOnTheLoopOfTheModule:
        @pytest.mark.qemu_vm(boot=1)
        async def test_the_controller_lives_there_too(self, vcpus):
            assert await vcpus.plug(3) == {3}
            assert vcpus.layout.enabled == {0, 3}

        @pytest.mark.scripted_qmp(answers={"query-status": {"status": "running"}})
        async def test_the_peer_lives_there_too(self, scripted_qmp):
            reader, writer = await asyncio.open_unix_connection(scripted_qmp.path)
            await reader.readline()
            writer.write(b'{"execute": "query-status"} {"execute": "device_del"}')
            assert b"running" in await reader.readline()
            command = await scripted_qmp.expect("device_del")
            await command.reply({})
            assert b"return" in await reader.readline()
            assert [line.sender for line in scripted_qmp.transcript][1:] == ["client", "qemu"] * 2
            writer.close()
"""

ANYIO = """
    import pytest

    import qmpvcpu

    pytestmark = pytest.mark.anyio


    @pytest.fixture
    def anyio_backend():
        return "asyncio"


    async def test_a_vm_is_for_any_loop(qemu_vm):
        async with qmpvcpu.attach(qemu_vm.qmp) as vm:
            assert await vm.plug(3) == {3}
"""


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("ini", "args"), [(AUTO, ()), (STRICT, ("-n", "2"))], ids=["auto mode", "strict mode and two processes"]
)
def test_a_test_of_any_kind_gets_the_vm_that_it_asks_for(tmp_path: Path, ini: str, args: tuple[str, ...]) -> None:
    write(tmp_path, ini, test_passing=PASSING, test_anyio=ANYIO if ini is STRICT else "")
    session = run(tmp_path, *args)
    assert session.outcomes == {"passed": 10 if ini is STRICT else 9}, session.output


@pytest.mark.qemu
def test_markers_and_fixtures_are_listed_with_what_they_take(tmp_path: Path) -> None:
    write(tmp_path)
    listed = run(tmp_path, "--markers", "--fixtures").output
    assert "@pytest.mark.qemu_vm(*, machine='q35', boot=1, max_vcpus=8, behaviour=()" in listed
    assert "vcpus" in run(tmp_path, "--fixtures").output


@pytest.mark.guest
def test_a_linux_obeys_a_test_and_its_controller(tmp_path: Path) -> None:
    write(
        tmp_path,
        test_linux="""
            import pytest

            import qmpvcpu


            @pytest.mark.linux_vm(boot=1, max_vcpus=4, min_version="10", timeout=120)
            async def test_linux_refuses(linux_vm, vcpus):
                await vcpus.plug(2)
                assert linux_vm.wait_online(lambda cpus: len(cpus) == 2) == {0, 1}
                linux_vm.refuse()
                with pytest.raises(qmpvcpu.UnplugRefusedError) as refused:
                    await vcpus.unplug(2)
                linux_vm.comply()
                await vcpus.unplug(2)
                assert linux_vm.online() == linux_vm.present() == {0}
                assert linux_vm.console == "to see the console"
        """,
    )
    session = run(tmp_path)
    assert session.outcomes == {"failed": 1}, session.output
    report = session.report("test_linux_refuses")
    assert "to see the console" in report
    assert "linux_vm: guest's console" in report
    assert "refuse on" in report.partition("linux_vm: guest's serial port")[2]


@pytest.mark.qemu
def test_a_marker_that_a_shared_vm_cannot_take_fails_the_test(tmp_path: Path) -> None:
    write(
        tmp_path,
        conftest="""
            import pytest

            @pytest.fixture(scope="session")
            def shared(shared_vms):
                with shared_vms.qemu_vm(boot=2) as vm:
                    yield vm
        """,
        test_own="""
            import pytest

            @pytest.mark.qemu_vm(boot=3)
            def test_has_one_of_its_own_too(shared, qemu_vm):
                assert qemu_vm.qmp != shared.qmp
        """,
        test_shared="""
            import pytest

            @pytest.fixture(scope="module")
            def qemu_vm(shared):
                return shared

            @pytest.mark.qemu_vm(boot=3)
            def test_says_what_is_not_so(qemu_vm):
                pass

            def test_takes_the_shared_one(qemu_vm):
                pass
        """,
    )
    session = run(tmp_path)
    assert session.outcomes == {"passed": 2, "error": 1}, session.output
    report = session.report("test_says_what_is_not_so")
    assert "@pytest.mark.qemu_vm(...) changes nothing here, since the test's VM is shared: give the options" in report


@pytest.mark.qemu
def test_tests_share_a_vm_for_as_long_as_they_like(tmp_path: Path) -> None:
    write(
        tmp_path,
        conftest="""
            import pytest

            @pytest.fixture(scope="class")
            def qemu_vm(shared_vms):
                with shared_vms.qemu_vm(max_vcpus=4) as vm, shared_vms.qemu_vm(boot=3):
                    yield vm
        """,
        test_shared="""
            import subprocess

            class TestOne:
                def test_plugs(self, qemu_vm):
                    subprocess.run(["qmpvcpu", "plug", "2", "--qmp", str(qemu_vm.qmp)], check=True)
                    qemu_vm.refuse(slot=2)

                async def test_finds_what_the_first_left(self, qemu_vm, vcpus):
                    assert vcpus.layout.enabled == {0, 2}

                def test_fails(self, qemu_vm):
                    assert not qemu_vm

            class TestTwo:
                async def test_has_another(self, vcpus):
                    assert vcpus.layout.enabled == {0}
                    assert vcpus.layout.max == 4

                def test_fails_without_a_vm(self, tmp_path):
                    assert not tmp_path

            def test_is_told_what_it_takes(shared_vms):
                with shared_vms.qemu_vm(boots=2):
                    pass
        """,
    )
    session = run(tmp_path, "--qemu-artifacts=kept")
    assert session.outcomes == {"passed": 3, "failed": 3}, session.output
    report = session.report("TestOne.test_fails")
    assert '"execute": "device_add"' in report.partition("qemu_vm: QMP transcript")[2]
    assert "qemu_vm 2: QEMU -" in report
    assert "qemu_vm" not in session.report("TestTwo.test_fails_without_a_vm")
    assert "qemu_vm has no option 'boots'; did you mean boot?" in session.report("test_is_told_what_it_takes")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["test_shared.py-TestOne-test_fails"]


SCRIPTED_AGENT = """
    import pytest

    from qmpvcpu.errors import AgentSilentError
    from qmpvcpu.testing import Mood

    pytestmark = pytest.mark.qemu_vm(boot=2)


    @pytest.mark.asyncio
    async def test_it_follows_the_vm(vcpus, scripted_agent, guest_agent):
        assert guest_agent is vcpus.guest
        await vcpus.plug(5)
        assert {cpu.vcpu: cpu.online for cpu in await guest_agent.vcpus()} == {0: True, 1: True, 5: False}
        await vcpus.unplug(5)
        assert [cpu.vcpu for cpu in await guest_agent.vcpus()] == [0, 1]


    @pytest.mark.asyncio(loop_scope="module")
    @pytest.mark.scripted_agent(vcpus=[0, 1], rule="arrival", onlines=True)
    async def test_it_is_as_the_marker_says_on_any_loop(vcpus, scripted_agent):
        await vcpus.plug(5)
        assert {cpu.vcpu: cpu.number for cpu in await vcpus.guest.vcpus() if cpu.online} == {0: 0, 1: 1, 5: 2}


    @pytest.mark.asyncio
    async def test_a_failure_shows_what_it_was_asked(vcpus, scripted_agent):
        await vcpus.guest.set_offline(1)
        await scripted_agent.turn(Mood.SILENT)
        await vcpus.guest.vcpus(timeout=0.5)


    def test_it_needs_an_async_test(scripted_agent):
        pass


    @pytest.mark.asyncio
    async def test_the_micro_guest_has_no_agent(qemu_vm, guest_agent):
        pass
"""


@pytest.mark.qemu
@pytest.mark.parametrize("ini", [AUTO, STRICT], ids=["auto mode", "strict mode"])
def test_a_scripted_agent_plays_for_the_vm_of_the_test(tmp_path: Path, ini: str) -> None:
    write(tmp_path, ini, test_agent=SCRIPTED_AGENT)
    session = run(tmp_path)
    assert session.outcomes == {"passed": 2, "failed": 1, "error": 2}, session.output
    report = session.report("test_a_failure_shows_what_it_was_asked")
    assert "AgentSilentError" in report
    assert "guest-get-vcpus" in report.partition("scripted_agent: asked")[2]
    assert "CPU 1 offline" in report.partition("scripted_agent: changed")[2]
    assert "scripted_agent answers on the loop of an async test" in session.report("test_it_needs_an_async_test")
    assert "the micro-guest of qemu_vm has no agent" in session.report("test_the_micro_guest_has_no_agent")


@pytest.mark.guest
def test_the_agent_of_a_linux_is_for_tests_of_any_kind(tmp_path: Path) -> None:
    write(
        tmp_path,
        test_agent="""
            import json
            import socket

            import pytest

            import qmpvcpu


            @pytest.fixture(scope="module")
            def linux_vm(shared_vms):
                with shared_vms.linux_vm(agent_blocks=["guest-get-time"]) as vm:
                    yield vm

            def ask(linux_vm, command):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(10)
                    sock.connect(str(linux_vm.agent))
                    sock.sendall(json.dumps({"execute": command}).encode())
                    return sock.makefile().readline()

            def test_a_plain_test_speaks_with_it(linux_vm):
                assert "return" in ask(linux_vm, "guest-ping")
                assert "CommandNotFound" in ask(linux_vm, "guest-get-time")
                linux_vm.stop_agent()
                linux_vm.start_agent()
                assert "return" in ask(linux_vm, "guest-get-time")

            async def test_so_does_the_controller(vcpus, linux_vm, guest_agent):
                linux_vm.set_auto_online(False)
                await vcpus.plug(2, proof=qmpvcpu.Proof.ACKNOWLEDGED)
                assert await guest_agent.set_online(2) == {2}
                assert linux_vm.online() == {0, 1, 2}
                linux_vm.pause_agent()
                await guest_agent.os(timeout=0.5)

            async def test_a_reset_starts_it_again(vcpus, linux_vm):
                await vcpus._driver.connection.monitor.execute("system_reset")
                linux_vm.wait_ready()
                assert (await vcpus.guest.os()).id == "qmpvcpu"
                linux_vm.pause_agent()
                linux_vm.resume_agent()
                assert len(await vcpus.guest.vcpus()) == 3

            @pytest.mark.agent(runs=False)
            def test_a_marker_is_too_late(linux_vm):
                pass
        """,
    )
    session = run(tmp_path)
    assert session.outcomes == {"passed": 2, "failed": 1, "error": 1}, session.output
    report = session.report("test_so_does_the_controller")
    assert "AgentSilentError" in report
    assert '{"return": 1, ' in report.partition("linux_vm: guest's agent")[2]
    assert "give the options to shared_vms.linux_vm(...)" in session.report("test_a_marker_is_too_late")
