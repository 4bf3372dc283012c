"""What the pages show in Python is run."""

import asyncio
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.errors import TargetLostError
from qmpvcpu.fleet import Fleet
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.vm import Topology
from qmpvcpu.testing import Behaviour, MicroGuest, QemuProcess, best_qemu
from tests.docs.blocks import block
from tests.domainxml.documents import SAMPLES
from tests.domainxml.domains import document, domain_of_rows, said
from tests.hosts.world import agent_of, connected, served, state, vm_in
from tests.migration.moving import move as move_live
from tests.migration.moving import save


@pytest.mark.qemu
async def test_the_example_of_the_testing_page_holds() -> None:
    module = block("docs/testing.md", "a guest that refuses, then complies").module()
    await module.a_test_of_yours()
    assert module.MicroGuest is MicroGuest


@pytest.mark.qemu
async def test_the_example_of_the_page_on_maps_holds(capsys: pytest.CaptureFixture[str]) -> None:
    resize = block("docs/maps.md", "a map, and what to do when the guest refuses").module().resize
    stubborn = Behaviour.refusing(0x82).for_slot(6)
    async with MicroGuest(boot=2, behaviour=stubborn) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(6)
        assert await resize(vm) == "REVERTED"
        assert vm.layout.enabled == {0, 1, 6}
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith("vCPUs 0-1,6 -> 0,2-5")
        assert printed[-1] == "6 the guest refused: device is busy (OST status 0x82)"
        await guest.set_behaviour(Behaviour.complying())
        assert await resize(vm) == "REACHED"


@pytest.mark.qemu
async def test_the_example_of_the_page_on_continuity_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = block("docs/continuity.md", "what was under way is found, and finished or reverted")
    come_back = example.module().come_back
    record = tmp_path / "vm.xml"
    async with MicroGuest(behaviour=Behaviour.hanging()) as guest:
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
        await guest.set_behaviour(Behaviour.complying())
        await come_back(str(guest.qmp), str(record))
    printed = capsys.readouterr().out
    assert "plug 5: PLUGGED" in printed
    assert "REACHED" in printed


@pytest.mark.qemu
async def test_the_examples_of_the_page_on_fleets_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = block("docs/fleet.md", "a map for all, and who did not come along").module()
    second = block("docs/fleet.md", "what happens anywhere, as it happens").module()
    async with MicroGuest() as one, MicroGuest(boot=5, behaviour=Behaviour.refusing(0x82)) as two:
        for name, guest in (("one", one), ("two", two)):
            (tmp_path / f"{name}.qmp").symlink_to(guest.qmp)
        assert await first.resize_all(str(tmp_path)) == [f"unix:{tmp_path}/two.qmp"]
        printed = capsys.readouterr().out
        assert re.search(r"one\.qmp 0-3 after 0\.\d{3} s", printed)
        assert "refused" in printed
        async with Fleet([one.qmp, two.qmp]) as fleet:
            await fleet.attach()

            async def leave() -> None:
                await fleet.each(lambda vm: vm.unplug(3))

            told, _ = await asyncio.gather(second.first_to_leave(fleet), leave())
            assert told == f"unix:{one.qmp}: vCPU 3 is gone"


@pytest.mark.qemu
async def test_the_example_of_other_hosts_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resize_web = block("docs/fleet.md", "a map for VMs of other hosts").module().resize_web
    async with (
        served() as server,
        vm_in(tmp_path, "web-1"),
        connected(server) as bus,
        agent_of(server, "rack1-a", tmp_path),
    ):
        await state(bus, VmKey("rack1-a", "web-1"), lambda told: "vm" in told)
        await resize_web(server.url)
    assert capsys.readouterr().out == "rack1-a/web-1 0-3\n"


@pytest.mark.qemu
async def test_the_examples_of_the_page_on_launching_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = block("docs/launch.md", "both ways, with real QEMUs").module()
    again = block("docs/launch.md", "a VM is started again from its record").module()
    machine = ("-machine", "q35", "-accel", "tcg", "-m", "16", "-name", "vm")
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
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("not known: the document was written from a running VM, and QEMU did not report which")
    async with (
        QemuProcess(best_qemu(), module.command_line_before_replay(document, *machine)) as qemu,
        qmpvcpu.attach(qemu.qmp) as vm,
    ):
        assert await module.rebuild(vm, document) == "plugged 6, 3; the order is (0, 1, 6, 3)"
    for _ in range(2):  # the second time from a record that the first QEMU's state is in
        async with QemuProcess(best_qemu(), module.command_line_before_replay(document, *machine)) as qemu:
            for _ in range(2):
                told = await again.bring_back(str(qemu.qmp), str(document))
                assert told == "0-1,3,6, created as (0, 1, 6, 3)"


@pytest.mark.qemu
async def test_the_examples_of_the_page_on_the_next_boot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = block("docs/next-boot.md", "both at once, and what the report tells of each").module()
    alone = block("docs/next-boot.md", "a document without its VM").module()
    xml = tmp_path / "vm.xml"
    xml.write_bytes(document(domain_of_rows("00------")))
    async with MicroGuest(boot=2) as guest:
        assert await both.for_good(str(guest.qmp), str(xml)) == "REACHED"
    assert capsys.readouterr().out.splitlines() == ["TransitionOutcome.REACHED", "next boot 0-1 to 0,2-3: WRITTEN"]
    assert await alone.resize(str(xml)) == "0-3,9 of 16"
    assert said((await qmpvcpu.DomainConfig.load(xml)).domain) == "00++-----+------"
    xml.write_bytes(document(replace(domain_of_rows("00------"), topology=Topology(8, sockets=2, cores=4))))
    assert await alone.resize(str(xml)) == "0-3,9 of 16"
    topology = (await qmpvcpu.DomainConfig.load(xml)).domain.topology
    assert topology == Topology(16, sockets=2, cores=8)


def test_the_example_of_the_page_on_documents_holds() -> None:
    example = block("docs/xml.md", "one line is added, and nothing else differs")
    document = SAMPLES["cputune-everything"]
    changed = example.module().pin(document, 3, "0-1")
    added = b"    <vcpupin vcpu='3' cpuset='0-1'/>\n"
    assert added not in document
    assert changed.replace(added, b"") == document


@pytest.mark.qemu
@pytest.mark.parametrize("what", ["the VM arrives", "its target dies"])
async def test_the_example_of_the_page_on_migration_holds(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    target_dies = what == "its target dies"
    move = block("docs/migration.md", "a VM with holes moves, or its target dies and it stays").module().move
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
            with pytest.raises(TargetLostError):
                await move(vm, there, migrate, target.process.kill)
            await vm.plug(1)
            return
        await move(vm, there, migrate, target.process.kill)
        assert capsys.readouterr().out.startswith("name: the source has 'here', the target 'there'")
        assert there.layout.order == (0, 6, 3)
        assert await there.unplug(6) == {6}
