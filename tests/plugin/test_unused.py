"""The plugin in sessions that have no use for it, or lack what it needs."""

import subprocess
import sys
from pathlib import Path

from tests.plugin.sessions import STRICT, environment, run, write


def modules_after(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, pytest; {statement}; print(*sys.modules)"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_loading_it_imports_next_to_nothing() -> None:
    added = modules_after("import qmpvcpu.testing.pytest_plugin") - modules_after("import qmpvcpu")
    assert added == {"qmpvcpu.testing", "qmpvcpu.testing.pytest_plugin"}


def test_a_session_without_vms_imports_and_leaves_nothing(tmp_path: Path) -> None:
    write(
        tmp_path,
        test_nothing="""
            import sys

            def test_nothing():
                ours = sorted(name for name in sys.modules if name.startswith("qmpvcpu.testing."))
                assert ours == [
                    "qmpvcpu.testing.plugin",
                    "qmpvcpu.testing.plugin.async_fixtures",
                    "qmpvcpu.testing.pytest_plugin",
                ]
        """,
    )
    (tmp_path / "temporary").mkdir()
    session = run(tmp_path, env=environment(TMPDIR=str(tmp_path / "temporary")))
    assert session.outcomes == {"passed": 1}, session.output
    assert not list((tmp_path / "temporary").iterdir())


def test_without_pytest_asyncio_only_what_needs_it_fails_and_says_so(tmp_path: Path) -> None:
    write(
        tmp_path,
        "[pytest]\nfilterwarnings = error\n",
        test_plain="""
            def test_plain(qemu_vm):
                qemu_vm.refuse()

            def test_controller(vcpus):
                pass

            def test_peer(scripted_qmp):
                pass
        """,
    )
    session = run(tmp_path, "-p", "no:asyncio")
    assert session.outcomes == {"passed": 1, "error": 2}
    for test, fixture in (("test_controller", "vcpus"), ("test_peer", "scripted_qmp")):
        assert f"the fixture {fixture} runs on the test's event loop and needs pytest-asyncio" in session.report(test)


def test_a_fixture_of_a_loop_that_the_test_does_not_run_on_is_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        STRICT,
        test_plain="""
            import pytest

            def test_plain(scripted_qmp):
                pass

            @pytest.mark.anyio
            @pytest.mark.parametrize("anyio_backend", ["asyncio"])
            async def test_anyio(vcpus):
                pass
        """,
    )
    session = run(tmp_path)
    assert "answers on the loop of an async test, run by pytest-asyncio" in session.report("test_plain")
    assert "`async with qmpvcpu.attach(qemu_vm.qmp) as vcpus` does" in session.report("test_anyio[asyncio]")
