"""certify as users run it: on a VM of theirs, and on one that it starts."""

import signal
from pathlib import Path

import pytest

from qmpvcpu.cli.certify import agent_of, with_room
from qmpvcpu.cli.result import BadUsageError
from qmpvcpu.testing import Behaviour, MicroGuest, best_qemu, rom_image
from qmpvcpu.testing.agent import ScriptedAgent
from tests.cli.running import environment, on_terminal, run, running
from tests.docs.blocks import Block, block
from tests.docs.session import Session

pytestmark = pytest.mark.qemu

QUICK = ("--boot", "0.3", "--timeout", "3")
STARTING = Behaviour.complying().starting()


@pytest.fixture
def own(tmp_path: Path) -> tuple[str, ...]:
    """The command line of a QEMU with the micro-guest; its paths are those of where the command is run."""
    (tmp_path / "guest.rom").write_bytes(rom_image(STARTING))
    words = f"-machine q35,accel=tcg -nodefaults -display none -m 16 -bios {tmp_path}/guest.rom"
    return ("--", str(best_qemu()), *words.split())


async def test_a_vm_is_certified_only_with_the_word_that_it_may_be_disturbed() -> None:
    async with MicroGuest(behaviour=STARTING, accel="tcg") as guest, ScriptedAgent(vcpus=range(8)) as agent:
        denied = await run("certify", *QUICK, "--json", "--qmp", guest.qmp)
        assert denied.code == 2
        assert "--disturb" in denied.error["message"]
        env = environment(QMPVCPU_AGENT=agent.path)
        ran = await run("certify", "--disturb", "--fresh", *QUICK, "--json", "--qmp", guest.qmp, env=env)
    assert ran.code == 0, ran
    document = ran.document
    assert document["enabled"] == "0"
    assert document["guest"] == "Debian GNU/Linux, 6.12.48+deb13-amd64"
    found = {row["ability"]: row["verdict"] for row in document["rows"] if row["verdict"] != "works"}
    assert found == {"refusal": "not_possible"}


async def test_what_did_not_work_is_shown_and_is_the_exit_code() -> None:
    refusing = Behaviour.refusing(0x82).starting()
    async with MicroGuest(behaviour=refusing, accel="tcg") as guest:
        ran = await run("certify", "--disturb", "--fresh", "--no-reset", *QUICK, "--qmp", guest.qmp)
    assert ran.code == 1
    rows = {line[:23].strip(): line[23:].strip() for line in ran.out.splitlines()}
    assert rows["unplug"].startswith("refused (")
    assert rows["unplug"].endswith("device is busy, OST status 0x82)")
    assert rows["plug again in that slot"] == "not possible (it needs: unplug)"
    assert "2 of 8 that were tried did not work: unplug, all out again (5 were not possible)" in ran.err
    assert "not as before: plugged are 0-" in ran.err


async def test_a_vm_of_its_own_is_started_with_room_and_ended(own: tuple[str, ...], tmp_path: Path) -> None:
    env = environment(TMPDIR=str(tmp_path), QMPVCPU_QMP="/nowhere")
    ran = await run("certify", "--no-reset", *QUICK, "--json", *own, "--name", "mine", env=env)
    assert (ran.code, ran.document["name"]) == (0, "mine")
    ran = await run("certify", *QUICK, "--json", *own, env=env)
    assert ran.code == 0
    assert (ran.document["max"], ran.document["enabled"], ran.document["name"]) == (8, "0", "guest")
    assert ran.document["accelerator"] == "tcg"
    assert [path.name for path in tmp_path.iterdir()] == ["guest.rom"]


async def test_a_page_gets_a_table(own: tuple[str, ...]) -> None:
    ran = await run("certify", "--markdown", "--no-reset", *QUICK, *own)
    assert ran.code == 0
    head, line, *rows = ran.out.splitlines()
    assert head.startswith("| vCPUs | pc-q35-")
    assert line == "| --- | --- |"
    assert rows[0].startswith("| plug | works (0.0")
    assert len(rows) == 13


async def test_the_line_on_the_page_is_understood(tmp_path: Path) -> None:
    line = block("docs/certify.md", "an image of yours").lines[0]
    kvm = "accel=kvm -m 1024 -snapshot -drive file=disk.img,if=virtio"
    assert kvm in line
    (tmp_path / "guest.rom").write_bytes(rom_image(STARTING))
    ours = line.replace(kvm, "accel=tcg -nodefaults -display none -m 16 -bios guest.rom")
    ours = ours.replace("--markdown", "--boot 0.3 --timeout 3").replace("qemu-system-x86_64", str(best_qemu()))
    async with Session(tmp_path) as session:
        printed = await session.run(Block("docs/certify.md", 1, "sh", ours))
    assert "all out again            works" in printed


async def test_it_fits_a_narrow_terminal(own: tuple[str, ...]) -> None:
    async with on_terminal("certify", "--no-reset", *QUICK, *own, columns=40, lines=200) as it:
        assert await it.end() == 0
    assert "…" not in str(it.screen)
    assert "all out again" in str(it.screen)


async def test_what_a_guest_that_never_answers_may_need_is_told_as_options() -> None:
    silent = Behaviour.silent_about_inserts().starting()
    async with MicroGuest(behaviour=silent, accel="tcg") as guest:
        ran = await run("certify", "--disturb", "--fresh", "--no-reset", "--timeout", "0.5", "--qmp", guest.qmp)
    assert "with a longer --boot, or with --agent" in " ".join(ran.out.split())


async def test_where_more_may_have_been_created_than_is_known_nothing_is_plugged() -> None:
    async with MicroGuest(behaviour=STARTING, max_vcpus=5, accel="tcg") as guest:
        ran = await run("certify", "--disturb", *QUICK, "--json", "--qmp", guest.qmp)
        assert ran.code == 0, ran
        rows = {row["ability"]: row for row in ran.document["rows"]}
        assert {name for name, row in rows.items() if row["verdict"] != "not_possible"} == {"put_back"}
        for name in ("plug", "after_reboot", "pending_over_reset"):
            assert rows[name]["detail"].endswith("confirm that none has with --fresh")
        assert (await run("list", "--qmp", guest.qmp)).code == 0


async def test_of_a_qemu_that_is_lost_nothing_is_said_of_its_vcpus() -> None:
    async with MicroGuest(behaviour=STARTING, accel="tcg", extra_args=("-no-reboot",)) as guest:
        ran = await run("certify", "--disturb", "--fresh", *QUICK, "--qmp", guest.qmp)
    assert ran.code == 3
    assert "QEMU lost (" in ran.out
    assert "not as before" not in ran.err


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
async def test_stopped_it_says_what_it_knows_and_leaves_nothing(
    own: tuple[str, ...], tmp_path: Path, sig: signal.Signals
) -> None:
    env = environment(TMPDIR=str(tmp_path))
    async with running("certify", "--boot", "0", "--timeout", "30", *own, env=env, code=WAITS) as it:
        await it.wait_said("now")
        it.process.send_signal(sig)
        ran = await it.end()
    assert ran.code == 130
    assert "plug                     works (" in ran.out
    assert f"stopped by {sig.name}" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["guest.rom"]


WAITS = """
import asyncio
from qmpvcpu import VcpuController
async def unplug(self, vcpu, **options):
    print("now", file=sys.stderr, flush=True)
    await asyncio.sleep(60)
VcpuController.unplug = unplug
"""


async def test_stopped_on_a_vm_of_somebody_it_puts_the_vcpus_back() -> None:
    async with MicroGuest(boot=(0, 5)) as guest:
        async with running("certify", "--disturb", "--fresh", "--qmp", guest.qmp, "--json", code=WAITS) as it:
            await it.wait_said("now")
            it.process.send_signal(signal.SIGINT)
            ran = await it.end()
        assert ran.code == 130
        assert ran.error["message"] == "stopped by SIGINT"
        assert ran.document["enabled"] == "0,5"
        assert ran.document["rows"][-1]["ability"] == "all_at_once"
        assert (await run("list", "--json", "--qmp", guest.qmp)).document["enabled"] == "0,5"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("certify", "--qmp", "/run/vm.qmp", "--", "qemu-system-x86_64"), "not both"),
        (("certify", "--disturb", "--", "qemu-system-x86_64"), "not both"),
        (("certify", "--", "/nowhere/qemu"), "no program"),
        (("certify", "--", "true", "-daemonize"), "-daemonize"),
        (("certify", "--", "true", "-smp", "many"), "-smp many: not understood"),
    ],
)
async def test_what_makes_no_sense_is_said_before_anything_is_started(words: tuple[str, ...], told: str) -> None:
    ran = await run("--json", *words)
    assert ran.code == 2
    assert told in ran.error["message"]


async def test_a_program_that_is_no_qemu_shows_its_words() -> None:
    ran = await run("certify", "--json", "--", "sh", "-c", "echo 'I am a teapot' >&2; exit 7")
    assert ran.code == 3
    assert ran.error["kind"] == "QemuStartError"
    assert "I am a teapot" in ran.error["stderr"]


async def test_a_qemu_that_ends_at_a_reset_is_shown_with_how_it_ended(own: tuple[str, ...]) -> None:
    ran = await run("certify", *QUICK, *own, "-no-reboot")
    assert ran.code == 3
    assert "plug after a reboot      QEMU lost (" in ran.out
    assert "QEMU ended with exit status 0" in ran.err


@pytest.mark.parametrize(
    ("given", "room"),
    [
        ("", "-smp 1,maxcpus=8"),
        ("-smp 2", "-smp cpus=2,maxcpus=10"),
        ("-smp 2,maxcpus=4", "-smp 2,maxcpus=4"),
        ("-smp 4,maxcpus=4", "-smp cpus=4,maxcpus=12"),
        ("-smp 2,sockets=2,cores=2", "-smp 2,sockets=2,cores=2"),
        ("-smp sockets=1,cores=2,threads=2", "-smp cpus=4,sockets=3,cores=2,threads=2,maxcpus=12"),
        ("-smp 1 -smp 2", "-smp 1 -smp cpus=2,maxcpus=10"),
    ],
)
def test_a_qemu_gets_room_where_it_has_none(given: str, room: str) -> None:
    assert with_room(given.split()) == room.split()


AGENT = "-chardev socket,id=ga,path=/run/ga,server=on,wait=off"
PORT = "-device virtserialport,chardev=ga,name=org.qemu.guest_agent.0"


@pytest.mark.parametrize(
    ("given", "agent"),
    [
        ("-m 16", None),
        (AGENT, None),
        (PORT, None),
        (f"{AGENT} -device virtio-serial {PORT}", "/run/ga"),
        (f"{PORT} {AGENT}", "/run/ga"),
        (f"{AGENT} -device virtserialport,chardev=ga,name=com.example", None),
        (f"-chardev socket,id=ga,host=::1,port=1 {PORT}", None),
    ],
)
def test_the_agent_of_a_qemu_that_it_starts_is_found(given: str, agent: str | None) -> None:
    assert agent_of(given.split()) == agent


def test_a_smp_that_is_none_is_refused() -> None:
    with pytest.raises(BadUsageError):
        with_room(["-smp", "cpus=2,maxcpus=lots"])
