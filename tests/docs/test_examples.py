"""What README and docs show is run."""

import asyncio
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.fleet import Fleet
from qmpvcpu.testing import MicroGuest, Personality, QemuProcess, best_qemu
from tests.domainxml.documents import SAMPLES
from tests.domainxml.domains import document, domain_of_rows, said
from tests.migration.moving import move as move_live
from tests.migration.moving import save

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def module_of(source: str) -> types.ModuleType:
    module = types.ModuleType("example")
    exec(compile(source, "example", "exec"), module.__dict__)  # noqa: S102 - the README's own code
    return module


@pytest.mark.qemu
async def test_the_script_in_the_readme_does_the_job(tmp_path: Path) -> None:
    script, _ = python_blocks(ROOT / "README.md")
    statements = [line for line in script.splitlines() if line.strip()]
    assert len(statements) <= 10
    (tmp_path / "script.py").write_text(script)
    async with MicroGuest() as guest:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "script.py",
            str(guest.qmp),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert output.decode().splitlines() == ["plugged: 3 now: 0,3", "unplugged: 3 now: 0"]
    assert process.returncode == 0
    assert b"<vcpu placement='static' current='1'>8</vcpu>" in (tmp_path / "vm.xml").read_bytes()


@pytest.mark.qemu
async def test_every_way_an_unplug_can_end_is_told_by_the_readme() -> None:
    take_out = module_of(python_blocks(ROOT / "README.md")[1]).take_out
    refusing = Personality.refusing(0x82).for_slot(2)
    async with MicroGuest(personality=refusing) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(2)
        await vm.plug(3)
        assert await take_out(vm, 2) == "refused: device is busy (130)"
        assert re.fullmatch(r"gone after 0\.\d{3} s", await take_out(vm, 3))


@pytest.mark.qemu
async def test_the_example_of_the_testing_page_holds() -> None:
    *_, example = python_blocks(ROOT / "docs" / "testing.md")
    module = module_of(example)
    await module.a_test_of_yours()
    assert module.MicroGuest is MicroGuest


@pytest.mark.qemu
async def test_the_example_of_the_page_on_maps_holds(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = python_blocks(ROOT / "docs" / "maps.md")
    resize = module_of(example).resize
    stubborn = Personality.refusing(0x82).for_slot(6)
    async with MicroGuest(boot=2, personality=stubborn) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(6)
        assert await resize(vm) == "REVERTED"
        assert vm.layout.enabled == {0, 1, 6}
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith("vCPUs 0-1,6 -> 0,2-5")
        assert printed[-1] == "6 the guest refused: device is busy (OST status 0x82)"
        await guest.become(Personality.obliging())
        assert await resize(vm) == "REACHED"


@pytest.mark.qemu
async def test_the_example_of_the_page_on_continuity_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = python_blocks(ROOT / "docs" / "continuity.md")
    come_back = module_of(example).come_back
    record = tmp_path / "vm.xml"
    async with MicroGuest(personality=Personality.held()) as guest:
        dying = (
            f"import asyncio, os, qmpvcpu\n"
            f"async def main():\n"
            f"    vm = await qmpvcpu.attach({str(guest.qmp)!r}, record={str(record)!r})\n"
            f"    await vm.set_map('0-2')\n"
            f"    asyncio.create_task(vm.set_map('0,5'))\n"
            f"    await vm.wait_for(lambda layout: layout.pending)\n"
            f"    os._exit(9)\n"
            f"asyncio.run(main())\n"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", dying)
        assert await process.wait() == 9
        await guest.become(Personality.obliging())
        await come_back(str(guest.qmp), str(record))
    printed = capsys.readouterr().out
    assert "plug 5: PLUGGED" in printed
    assert "REACHED" in printed


@pytest.mark.qemu
async def test_the_examples_of_the_page_on_fleets_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = python_blocks(ROOT / "docs" / "fleet.md")
    async with MicroGuest() as one, MicroGuest(boot=5, personality=Personality.refusing(0x82)) as two:
        for name, guest in (("one", one), ("two", two)):
            (tmp_path / f"{name}.qmp").symlink_to(guest.qmp)
        assert await module_of(first).resize_all(str(tmp_path)) == [f"unix:{tmp_path}/two.qmp"]
        printed = capsys.readouterr().out
        assert re.search(r"one\.qmp 0-3 after 0\.\d{3} s", printed)
        assert "refused" in printed
        async with Fleet([one.qmp, two.qmp]) as fleet:
            await fleet.attach()

            async def leave() -> None:
                await fleet.each(lambda vm: vm.unplug(3))

            told, _ = await asyncio.gather(module_of(second).first_to_leave(fleet), leave())
            assert told == f"unix:{one.qmp}: vCPU 3 is gone"


@pytest.mark.qemu
async def test_the_examples_of_the_page_on_launching_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = python_blocks(ROOT / "docs" / "launch.md")
    module = module_of(example)
    machine = ("-machine", "q35", "-accel", "tcg", "-m", "16")
    document = tmp_path / "vm.xml"
    async with (
        QemuProcess(best_qemu(), [*machine, "-smp", "2,maxcpus=8", "-S"]) as qemu,
        qmpvcpu.attach(qemu.qmp, record=document) as vm,
    ):
        await vm.set_map("0-1,6")
        await vm.plug(3)
        assert vm.layout.order == (0, 1, 6, 3)
    async with (
        QemuProcess(best_qemu(), [*module.command_line(document, *machine), "-S"]) as qemu,
        qmpvcpu.attach(qemu.qmp) as vm,
    ):
        assert vm.layout.order == (0, 1, 6, 3)
    assert capsys.readouterr().out == ""
    async with (
        QemuProcess(best_qemu(), module.command_line_before_replay(document, *machine)) as qemu,
        qmpvcpu.attach(qemu.qmp) as vm,
    ):
        assert await module.rebuild(vm, document) == "plugged 6, 3; the order is (0, 1, 6, 3)"


@pytest.mark.qemu
async def test_the_examples_of_the_page_on_the_next_boot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, alone = python_blocks(ROOT / "docs" / "next-boot.md")
    xml = tmp_path / "vm.xml"
    xml.write_bytes(document(domain_of_rows("00------")))
    async with MicroGuest(boot=2) as guest:
        assert await module_of(both).for_good(str(guest.qmp), str(xml)) == "REACHED"
    assert capsys.readouterr().out.splitlines() == ["TransitionOutcome.REACHED", "next boot 0-1 to 0,2-3: WRITTEN"]
    assert await module_of(alone).resize(str(xml)) == "0-3,9 of 16"
    assert said((await qmpvcpu.DomainConfig.load(xml)).domain) == "00++-----+------"


def test_the_example_of_the_page_on_documents_holds() -> None:
    (example,) = python_blocks(ROOT / "docs" / "xml.md")
    document = SAMPLES["cputune-everything"]
    changed = module_of(example).pin(document, 3, "0-1")
    added = b"    <vcpupin vcpu='3' cpuset='0-1'/>\n"
    assert added not in document
    assert changed.replace(added, b"") == document


@pytest.mark.qemu
@pytest.mark.parametrize("what", ["the VM arrives", "its target dies"])
async def test_the_example_of_the_page_on_migration_holds(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    target_dies = what == "its target dies"
    (example,) = python_blocks(ROOT / "docs" / "migration.md")
    move = module_of(example).move
    async with (
        MicroGuest() as source,
        MicroGuest(best_qemu(), accel=source.accelerator, incoming=True) as target,
        qmpvcpu.attach(source.qmp, name="here") as vm,
        qmpvcpu.attach(target.qmp, name="there") as there,
    ):
        for vcpu in (6, 3):
            await vm.plug(vcpu)

        async def migrate() -> str:
            if target_dies:
                target.process.kill()
                return await save(source, Path("/dev/null"))
            return await move_live(source, target)

        if target_dies:
            with pytest.raises(qmpvcpu.TargetLostError):
                await move(vm, there, migrate, target.process.kill)
            await vm.plug(1)
            return
        await move(vm, there, migrate, target.process.kill)
        assert capsys.readouterr().out.startswith("name: the source has 'here', the target 'there'")
        assert there.layout.order == (0, 6, 3)
        assert await there.unplug(6) == {6}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_error_and_reason_is_on_the_errors_page() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    abstract = {"QmpVcpuError", "PlanError", "MonitorError", "StepError"}
    errors = {name for name in qmpvcpu.__all__ if name.endswith("Error")} - abstract
    assert [name for name in sorted(errors) if f"`{name}`" not in text] == []
    assert [reason.name for reason in qmpvcpu.DenialReason if f"`{reason.name}`" not in text] == []


def test_every_dependency_is_named_with_its_reason() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    specs = [
        *project["dependencies"],
        *(spec for extra in project["optional-dependencies"].values() for spec in extra),
    ]
    named = {re.split(r"[\[<>=]", spec)[0] for spec in specs}
    assert len(named) > 10
    assert [name for name in sorted(named) if f"`{name}`" not in text] == []
