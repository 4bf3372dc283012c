"""What is chosen, and what is not there."""

import shutil
from pathlib import Path

import pytest

from qmpvcpu.testing import best_qemu
from tests.plugin.sessions import AUTO, environment, run, write
from tests.substrates import qemus

pytestmark = pytest.mark.qemu

SAME = 'exec "$QEMU" "$@"'
ONE = "def test_one(qemu_vm): assert qemu_vm.accelerator == 'tcg'\n"


def wrapper(path: Path, script: str) -> Path:
    """A QEMU that is run by a script; it is told what to run as $QEMU."""
    path.write_text(f"#!/bin/sh\nQEMU={best_qemu()}\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("choice", ["fail", "skip"])
def test_without_qemu_a_test_fails_or_is_skipped_as_chosen_and_says_what_to_install(
    tmp_path: Path, choice: str
) -> None:
    write(tmp_path, test_missing=f"{ONE}\nasync def test_another(vcpus): pass\n")
    (tmp_path / "bin").mkdir()
    nothing = environment(PATH=str(tmp_path / "bin"), QMPVCPU_CACHE=str(tmp_path), QMPVCPU_MISSING=choice)
    session = run(tmp_path, "-rs", env=nothing)
    assert session.outcomes == {"error" if choice == "fail" else "skipped": 2}
    assert "no qemu-system-x86_64 in PATH or in" in session.output
    assert "apt-get install qemu-system-x86" in session.output
    assert ("--qemu-missing=skip skips such tests" in session.output) == (choice == "fail")


def test_what_is_named_and_no_qemu_is_said_by_its_name(tmp_path: Path) -> None:
    write(tmp_path, test_one=ONE)
    no_qemu = run(tmp_path, "--qemu-binary=/nonexistent/qemu", f"--qemu-binary={shutil.which('true') or 'true'}")
    assert no_qemu.outcomes == {"error": 2}
    assert "there is no QEMU /nonexistent/qemu." in no_qemu.report("test_one[/nonexistent/qemu]")
    assert "true is not a QEMU: it does not answer --version" in no_qemu.output


def test_without_the_linux_guest_it_is_said_how_it_is_made(tmp_path: Path) -> None:
    write(tmp_path, test_linux="def test_linux(linux_vm): pass\n")
    session = run(tmp_path, env=environment(QMPVCPU_QEMU=str(best_qemu()), QMPVCPU_CACHE=str(tmp_path)))
    assert session.outcomes == {"error": 1}
    assert "`python -m qmpvcpu.testing.linuxguest`" in session.output


def test_a_kvm_that_is_there_and_runs_no_guest_is_found_out_once_and_tcg_taken(tmp_path: Path) -> None:
    # The guest never gets to run under what it takes for KVM, as on hosts whose KVM is broken.
    script = 'case "$*" in *"-accel kvm"*) echo >>"$PROBES"; exec "$QEMU" -S -accel tcg -machine q35 -m 16;; esac'
    broken = wrapper(tmp_path / "broken", f'{script}\nexec "$QEMU" "$@"')
    write(tmp_path, test_a=ONE, test_b=ONE, test_c=ONE)
    env = environment(QMPVCPU_QEMU=str(broken), PROBES=str(tmp_path / "probes"))
    session = run(tmp_path, "-n", "2", env=env)
    assert session.outcomes == {"passed": 3}, session.output
    assert (tmp_path / "probes").read_text() == "\n"


def test_a_kvm_that_was_asked_for_and_runs_no_guest_is_missing(tmp_path: Path) -> None:
    broken = wrapper(tmp_path / "broken", 'case "$*" in *"-accel kvm"*) exit 1;; esac\nexec "$QEMU" "$@"')
    write(
        tmp_path,
        f"{AUTO}qemu_binary = {broken}\nqemu_missing = skip\n",
        test_kvm="import pytest\n@pytest.mark.qemu_vm(accel='kvm')\ndef test_kvm(qemu_vm): pass\n",
        test_one=ONE,
    )
    asked = run(tmp_path, "--qemu-accel=kvm", "--qemu-missing=fail")
    assert asked.outcomes == {"error": 2}
    assert f"KVM was asked for, and runs no guest of {broken} here. /dev/kvm must" in asked.report("test_kvm")
    by_marker = run(tmp_path, "-rs")
    assert by_marker.outcomes == {"skipped": 1, "passed": 1}
    assert "KVM was asked for" in by_marker.output


def test_each_qemu_that_was_named_runs_every_test_that_it_is_new_enough_for(tmp_path: Path) -> None:
    old, new = (str(qemus()[series]) for series in ("7.2", "10.0"))
    write(
        tmp_path,
        test_versions="""
            import pytest

            @pytest.mark.qemu_vm(min_version="10.0", accel="tcg")
            async def test_new(qemu_vm, vcpus):
                assert qemu_vm.version.startswith("10.0.")

            @pytest.mark.qemu_vm(accel="kvm")
            def test_excluded(qemu_vm):
                pass

            async def test_any(vcpus):
                assert vcpus.capabilities.qemu_version[0] in {7, 10}
        """,
    )
    session = run(tmp_path, "-rs", env=environment(QMPVCPU_QEMU=f"{old}:{new}", QMPVCPU_ACCEL="tcg"))
    assert session.outcomes == {"passed": 3, "skipped": 3}, session.output
    assert f"needs QEMU 10.0, {old} is 7.2." in session.output
    assert "needs kvm, and tcg was chosen" in session.output


@pytest.mark.parametrize("how", ["option", "environment", "ini"])
def test_qemus_with_colons_between_run_each_test_wherever_they_are_named(tmp_path: Path, how: str) -> None:
    named = f"{wrapper(tmp_path / 'one', SAME)}:~/another"
    wrapper(tmp_path / "another", SAME)
    write(tmp_path, f"{AUTO}qemu_binary = {named}\n" if how == "ini" else AUTO, test_one=ONE)
    env = {"HOME": str(tmp_path), "QMPVCPU_ACCEL": "tcg"}
    env |= {"QMPVCPU_QEMU": named} if how == "environment" else {}
    session = run(tmp_path, *([f"--qemu-binary={named}"] if how == "option" else []), env=environment(**env))
    assert session.outcomes == {"passed": 2}, session.output


def test_a_choice_that_is_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path, test_one=ONE)
    assert "invalid choice: 'xen'" in run(tmp_path, "--qemu-accel=xen").output
    session = run(tmp_path, env=environment(QMPVCPU_ACCEL="xen"))
    assert "qemu_accel is 'xen' (from QMPVCPU_ACCEL or the ini file), must be one of auto, kvm, tcg" in session.output
    assert session.returncode
    assert "qmpvcpu/testing" not in session.report("test_one")


def test_without_a_directory_for_sockets_it_is_said_which_and_why(tmp_path: Path) -> None:
    long = tmp_path / ("x" * max(1, 85 - len(str(tmp_path))))
    long.mkdir()
    conftest = "import qmpvcpu.testing.directory\nqmpvcpu.testing.directory._SHORT = ()\n"
    write(tmp_path, conftest=conftest, test_one=ONE)
    session = run(tmp_path, env=environment(TMPDIR=str(long)))
    assert session.outcomes == {"error": 1}
    report = session.report("test_one")
    assert "Set TMPDIR to a directory of at most" in report
    assert "Traceback" not in report
    assert "qmpvcpu/testing" not in report
