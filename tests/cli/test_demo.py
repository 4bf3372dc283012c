import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpvcpu.testing import find_qemus
from tests.cli.running import Ran, environment, run, running

STORY = [
    ("plug 3", "plugged", "0,3"),
    ("plug 6", "plugged", "0,3,6"),
    ("plug 5", "plugged", "0,3,5-6"),
    ("plug", "plugged", "0-1,3,5-6"),
    ("unplug 6", "unplugged", "0-1,3,5"),
    ("unplug 5", "refused", "0-1,3,5"),
    ("unplug 5", "unplugged", "0-1,3"),
    ("unplug 1", "pending", "0-1,3"),
    ("(event)", "unplugged", "0,3"),
]


def check_story(ran: Ran) -> None:
    assert ran.code == 0, ran
    document = ran.document
    steps = document["steps"]
    assert [(step["call"], step["verdict"]["kind"], step["map"]) for step in steps] == STORY
    refused, late = steps[5], steps[-1]
    assert (refused["verdict"]["code"], refused["verdict"]["reason"]) == (0x82, "device is busy")
    assert late["late"] is True
    assert steps[-2]["pending"] == "1"
    assert (document["as_expected"], document["differences"]) == (True, [])
    assert (document["enabled"], document["pending"]) == ("0,3", "")
    assert "<vcpu id='3' enabled='yes' hotpluggable='yes' order='2'/>" in document["xml"]


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def pretend_without_kvm(qemu: Path, directory: Path) -> Path:
    """A QEMU as on a machine whose KVM does not open."""
    wrapper = directory / "qemu-system-x86_64"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *"-accel kvm"*) echo "no KVM here" >&2; exit 1 ;; esac\nexec {qemu} "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


@pytest.mark.qemu
@pytest.mark.parametrize("version", find_qemus())
async def test_the_demo_shows_every_verdict_on_every_qemu(
    version: str, record_property: Callable[[str, object], None]
) -> None:
    qemu = find_qemus()[version]
    ran = await run("demo", "--json", "--qemu", qemu)
    check_story(ran)
    document = ran.document
    record_property("seconds", document["seconds"])
    assert 0 < document["seconds"] < 20  # 0.4 measured
    assert document["qemu"]["path"] == str(qemu)
    assert f"<emulator>{qemu}</emulator>" in document["xml"]


@pytest.mark.qemu
@pytest.mark.parametrize("version", find_qemus())
async def test_the_demo_needs_no_kvm(version: str, tmp_path: Path) -> None:
    ran = await run("demo", "--json", "--qemu", pretend_without_kvm(find_qemus()[version], tmp_path))
    check_story(ran)
    assert ran.document["accelerator"] == "tcg"


@pytest.mark.qemu
async def test_the_demo_shows_people_the_map_at_each_step_and_the_xml() -> None:
    ran = await run("demo")
    assert ran.code == 0
    for words in (
        "plug 3    [0][ ][ ][3][ ][ ][ ][ ] PLUGGED",
        "unplug 5  [0][1][ ][3][ ][5][ ][ ] REFUSED",
        "0x82 device is busy",
        "unplug 1  [0](1)[ ][3][ ][ ][ ][ ] PENDING",
        "(event)   [0][ ][ ][3][ ][ ][ ][ ] UNPLUGGED",
        "the late answer",
        "<domain type='",
    ):
        assert words in ran.out
    assert max(map(len, ran.out.partition("<domain")[0].splitlines()[1:])) <= 80


@pytest.mark.qemu
async def test_a_guest_that_does_otherwise_fails_the_demo_and_is_named() -> None:
    complying = "from qmpvcpu.testing import MicroGuest\nasync def comply(self): pass\nMicroGuest.refuse = comply"
    ran = await run("demo", "--json", code=complying)
    assert ran.code == 1
    document = ran.document
    assert document["as_expected"] is False
    [difference] = document["differences"]
    assert difference.startswith("unplug 5: expected REFUSED, got Unplugged")
    assert difference in ran.err or (await run("demo", code=complying)).err.count("expected REFUSED") == 1


@pytest.mark.qemu
async def test_a_demo_without_a_qemu_says_what_to_install(tmp_path: Path) -> None:
    env = environment(PATH=str(tmp_path), QMPVCPU_CACHE=str(tmp_path))
    ran = await run("demo", "--json", env=env)
    assert ran.code == 2
    assert ran.error["kind"] == "QemuNotFoundError"
    assert "qemu-system-x86_64" in ran.error["message"]


@pytest.mark.qemu
@pytest.mark.parametrize("command", ["demo", "doctor"])
async def test_where_no_directory_can_hold_sockets_it_is_named(tmp_path: Path, command: str) -> None:
    long = tmp_path / ("x" * max(1, 85 - len(str(tmp_path))))
    long.mkdir()
    code = (
        "import qmpvcpu.testing.directory\nqmpvcpu.testing.directory._SHORT = (__import__('pathlib').Path('/none'),)"
    )
    ran = await run(command, env=environment(TMPDIR=str(long)), code=code)
    assert ran.code == (2 if command == "demo" else 1)
    said = " ".join((ran.out + ran.err).split())
    assert "/none cannot be written. Set TMPDIR to a directory of at most 83 bytes" in said
    assert "Traceback" not in said


@pytest.mark.qemu
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
async def test_a_demo_that_is_stopped_leaves_nothing_behind(tmp_path: Path, sig: signal.Signals) -> None:
    waits = (
        "import asyncio\nfrom qmpvcpu.testing import MicroGuest\n"
        "async def wait(self):\n    print('now', file=sys.stderr)\n    await asyncio.sleep(60)\n"
        "MicroGuest.refuse = wait"
    )
    async with running("demo", "--json", env=environment(TMPDIR=str(tmp_path)), code=waits) as it:
        await it.wait_said("now")
        assert files_in(tmp_path)
        it.process.send_signal(sig)
        ran = await it.end()
    assert ran.code == 130
    assert ran.error["message"] == f"stopped by {sig.name}"
    assert [step["call"] for step in ran.document["steps"]] == ["plug 3", "plug 6", "plug 5", "plug", "unplug 6"]
    assert not files_in(tmp_path)


@pytest.mark.qemu
async def test_a_demo_on_something_that_is_no_qemu_shows_its_words(tmp_path: Path) -> None:
    impostor = tmp_path / "qemu"
    impostor.write_text("#!/bin/sh\necho 'I am a teapot' >&2\nexit 7\n")
    impostor.chmod(0o755)
    ran = await run("demo", "--json", "--qemu", impostor)
    assert ran.code == 3
    assert ran.error["kind"] == "QemuStartError"
    assert "I am a teapot" in ran.error["stderr"]
    assert ran.error["returncode"] == 7


@pytest.mark.qemu
async def test_a_demo_without_the_linux_guest_says_how_to_make_it(tmp_path: Path) -> None:
    env = environment(QMPVCPU_CACHE=str(tmp_path))
    ran = await run("demo", "--guest", "linux", "--json", env=env)
    assert ran.code == 2
    assert "`python -m qmpvcpu.testing.linuxguest`" in ran.error["message"]


@pytest.mark.guest
async def test_linux_sees_the_chosen_cpus_come_and_go() -> None:
    ran = await run("demo", "--guest", "linux", "--json")
    check_story(ran)
    seen = [step["guest_online"] for step in ran.document["steps"]]
    assert seen[:4] == ["0-1", "0-2", "0-3", "0-4"]
    # Linux numbers CPUs in the order in which they came: 3 is its 1, 6 its 2, 5 its 3, 1 its 4.
    assert seen[4:] == ["0-1,3-4", "0-1,3-4", "0-1,4", None, "0-1"]
    assert f"<vcpu placement='static' current='2'>{ran.document['max']}</vcpu>" in ran.document["xml"]


@pytest.mark.qemu
@pytest.mark.libvirt
async def test_libvirt_takes_the_xml_of_the_demo(tmp_path: Path) -> None:
    document = tmp_path / "demo.xml"
    document.write_text((await run("demo", "--json")).document["xml"])
    checks = ["virt-xml-validate"], ["virsh", "-c", "test:///default", "define", "--validate"]
    for check in checks:
        done = subprocess.run([*check, document], capture_output=True, text=True, check=False)  # noqa: ASYNC221 - alone
        assert done.returncode == 0, done.stderr
