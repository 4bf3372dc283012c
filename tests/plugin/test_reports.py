"""What is said of a test that fails: one session of them, looked at in several ways."""

import re
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from qmpvcpu.testing.qemu import fate
from qmpvcpu.testing.signals import send_signal
from tests.plugin.sessions import AUTO, Session, environment, run, write

pytestmark = pytest.mark.qemu

FAILING = """
    import os
    import signal

    import pytest

    import qmpvcpu


    async def test_refused(qemu_vm):
        qemu_vm.refuse()
        async with qmpvcpu.attach(qemu_vm.qmp) as vm:
            await vm.plug(2)
            await vm.unplug(2)


    @pytest.mark.qemu_vm(extra_args=["-device", "pcie-root-port,id=lower"])
    async def test_crashed(qemu_vm, vcpus):
        os.kill(qemu_vm.pid, signal.SIGSEGV)
        await vcpus.plug(2)


    @pytest.fixture
    def fails_at_its_end(qemu_vm):
        yield
        raise RuntimeError("at the end")


    def test_passes_and_fails_at_its_end(qemu_vm, fails_at_its_end):
        pass


    async def test_of_a_peer(scripted_qmp):
        assert await qmpvcpu.attach(scripted_qmp.path, reply_timeout=0.1)


    def test_of_two(qemu_vm_factory):
        assert qemu_vm_factory() == qemu_vm_factory()


    def test_without_a_vm():
        assert not "a VM"


    def test_all_is_well(qemu_vm):
        pass


    @pytest.mark.xfail(strict=True)
    def test_fails_as_expected(qemu_vm):
        assert not qemu_vm
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing")


@pytest.fixture(scope="module")
def session(directory: Path) -> Session:
    write(directory, test_failing=FAILING)
    return run(directory, "-n", "2", "--junitxml=junit.xml", "--qemu-artifacts=kept/here")


def test_each_phase_that_can_fail_is_reported(session: Session) -> None:
    assert session.outcomes == {"failed": 5, "error": 1, "passed": 2}, session.output


def test_the_transcript_shows_both_sides_with_times(session: Session) -> None:
    report = session.report("test_refused")
    transcript = report.partition("qemu_vm: QMP transcript")[2]
    line = r"\d\d:\d\d:\d\d\.\d{6} qmp1"
    assert re.search(rf'{line} -> {{"execute": "device_del", .*"id": "vcpu2"', transcript)
    assert re.search(rf'{line} <- .*"ACPI_DEVICE_OST".*"status": 130', transcript)


def test_the_log_the_command_line_and_the_guests_words_are_there(session: Session) -> None:
    report = session.report("test_refused")
    assert "It runs." in report
    assert "-bios microguest.rom" in report
    assert "t: that it took up its behaviours" in report.partition("qemu_vm: guest's serial port")[2]


def test_a_crash_is_told_by_its_signal(session: Session) -> None:
    report = session.report("test_crashed")
    assert "It was ended by SIGSEGV (signal 11)." in report
    assert '"execute": "qmp_capabilities"' in report  # what was said before it is not lost
    assert "id=lower" in report


def test_a_stopped_qemu_is_not_said_to_run() -> None:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        try:
            assert fate(process.pid, None) == "runs"
            send_signal(process.pid, signal.SIGSTOP)
            assert fate(process.pid, None) == "is stopped (SIGSTOP); SIGCONT lets it go on"
        finally:
            process.kill()


def test_what_fails_after_the_vm_is_gone_is_told_all_the_same(session: Session) -> None:
    report = session.report("test_passes_and_fails_at_its_end")
    assert "RuntimeError: at the end" in report
    assert "qemu_vm: guest's serial port" in report


def test_a_scripted_peer_has_its_transcript(session: Session) -> None:
    assert re.search(r"qmp <- .*\"scripted\"(.*\n)*.*qmp -> .*qmp_capabilities", session.report("test_of_a_peer"))


def test_vms_are_told_apart(session: Session) -> None:
    report = session.report("test_of_two")
    assert "- qemu_vm: QEMU -" in report
    assert "- qemu_vm 2: QEMU -" in report


def test_others_reports_are_left_alone(session: Session) -> None:
    assert "qemu_vm" not in session.report("test_without_a_vm")
    assert session.output.count("QMP transcript") == 3  # of test_refused, test_crashed, test_of_a_peer


def test_junit_has_it_too(session: Session, directory: Path) -> None:
    assert session.returncode == 1
    cases = {case.get("name"): case for case in ET.parse(directory / "junit.xml").iter("testcase")}  # noqa: S314
    failure = cases["test_crashed"].find("failure")
    assert failure is not None
    assert failure.text is not None
    assert "It was ended by SIGSEGV (signal 11)." in failure.text
    assert cases["test_all_is_well"].find("failure") is None


def test_the_whole_of_it_is_kept_as_files(session: Session, directory: Path) -> None:
    assert session.returncode == 1
    kept = directory / "kept" / "here"
    assert {path.name for path in kept.iterdir()} == {
        "test_failing.py-test_refused",
        "test_failing.py-test_crashed",
        "test_failing.py-test_passes_and_fails_at_its_end",
        "test_failing.py-test_of_a_peer",
        "test_failing.py-test_of_two",
    }
    refused = kept / "test_failing.py-test_refused" / "qemu_vm"
    assert {path.name for path in refused.iterdir()} == {
        *("QEMU.txt", "QEMU-log.txt", "QMP-transcript.txt", "guest-s-serial-port.txt")
    }
    assert '"execute": "device_del"' in (refused / "QMP-transcript.txt").read_text()
    assert (kept / "test_failing.py-test_of_two" / "qemu_vm-2" / "QEMU.txt").exists()


def test_what_cannot_be_kept_does_not_end_the_session(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    write(
        tmp_path,
        test_two="""
            import pytest

            def test_fails(qemu_vm):
                (qemu_vm.qmp.parent / "stderr").write_text("\x1b[2Jall is white")
                assert not qemu_vm

            def test_passes(qemu_vm):
                pass
        """,
    )
    session = run(tmp_path, "--qemu-artifacts=taken")
    assert session.outcomes == {"failed": 1, "passed": 1}
    report = session.report("test_fails")
    assert "qemu_vm: not kept" in report
    assert "Not a directory" in report
    assert r"\x1b[2Jall is white" in report


def test_what_was_kept_of_a_test_that_passed_goes_with_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        conftest="""
            from qmpvcpu.testing.pytest_plugin import EVIDENCE

            def pytest_sessionfinish(session):
                print("kept:", [len(item.stash[EVIDENCE]) for item in session.items])
        """,
        test_passing="def test_passes(qemu_vm): pass",
    )
    assert "kept: [0]" in run(tmp_path, "-s").output


def test_a_choice_that_cannot_be_does_not_end_a_session_that_makes_none(tmp_path: Path) -> None:
    write(
        tmp_path,
        test_peer="""
            async def test_fails(scripted_qmp):
                assert not scripted_qmp

            def test_passes():
                pass
        """,
    )
    session = run(tmp_path, env=environment(QMPVCPU_ACCEL="xen"))
    assert session.outcomes == {"failed": 1, "passed": 1}


@pytest.mark.parametrize("option", ["--qemu-binary", "--qemu-artifacts"])
@pytest.mark.parametrize("where", ["in the command line", "in the environment"])
def test_a_path_after_a_space_would_lose_the_ini_file(tmp_path: Path, option: str, where: str) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "project", test_one="def test_one(qemu_vm): pass")
    words = option, str(tmp_path / "elsewhere")
    if where == "in the command line":
        session = run(tmp_path / "project", *words)
    else:
        session = run(tmp_path / "project", env=environment(PYTEST_ADDOPTS=" ".join(words)))
    assert session.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"write {option}=PATH: after a space" in session.output


def test_an_ini_file_may_give_a_path_as_it_likes(tmp_path: Path) -> None:
    write(tmp_path, AUTO + "addopts = --qemu-artifacts kept\n", test_one="def test_one(): pass")
    assert run(tmp_path).outcomes == {"passed": 1}


def test_a_vm_that_cannot_be_is_said_so_in_the_words_of_the_mistake(tmp_path: Path) -> None:
    mistakes = {
        "max_vcpu=8": "qemu_vm has no option 'max_vcpu'; did you mean max_vcpus? It takes: machine, boot, max_vcpus",
        "max_vcpus=4, topology='sockets=3'": "impossible VM: 'sockets=3' does not make 4 vCPUs of sockets",
        "topology='cores'": "impossible VM: 'cores' is not a topology, such as 'sockets=2,cores=2,threads=2'",
        "boot=9": "impossible VM: boot is 9, must be within 0..7",
        "boot=None": "impossible VM: ",
        "'q35'": "@pytest.mark.qemu_vm takes keywords only: machine",
        "accel='hvf'": "qemu_vm(accel='hvf'): must be 'kvm' or 'tcg'",
        "extra_args='-m 9'": "qemu_vm(extra_args='-m 9'): must be a list, such as ['-m', '9']",
        "min_version='new'": "qemu_vm(min_version='new'): must be as '10.0'",
        "behaviour=[Behaviour.silent()] * 9": "impossible VM: 9 behaviours, the micro-guest holds 8",
        "machine='nonesuch'": 'unsupported machine type: "nonesuch"',
    }
    tests = [
        f"@pytest.mark.qemu_vm({options})\ndef test_mistake_{number}(qemu_vm): pass\n"
        for number, options in enumerate(mistakes)
    ]
    tests += [
        "@pytest.mark.parametrize('qemu_vm', [8], indirect=True, ids=str)\ndef test_parameter(qemu_vm): pass\n",
        "@pytest.mark.parametrize('qemu_vm', [{1: 2}], indirect=True, ids=['1'])\ndef test_name(qemu_vm): pass\n",
        "def test_factory(qemu_vm_factory): qemu_vm_factory(boots=1)\n",
    ]
    write(tmp_path, test_mistakes="import pytest\nfrom qmpvcpu.testing import Behaviour\n" + "\n".join(tests))
    session = run(tmp_path)
    assert session.outcomes == {"error": len(mistakes) + 2, "failed": 1}
    for number, said in enumerate(mistakes.values()):
        report = session.report(f"test_mistake_{number}")
        assert said in report
        assert "Traceback" not in report
        assert "another exception" not in report
        assert "qmpvcpu/testing" not in report
    assert "the parameter of qemu_vm is 8, must be a dict of options, a Behav" in session.report("test_parameter[8]")
    assert "qemu_vm has no option 1. It takes: machine" in session.report("test_name[1]")
    assert "qemu_vm has no option 'boots'; did you mean boot?" in session.report("test_factory")
