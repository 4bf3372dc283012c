"""A record, an export and a document of a running VM describe this VM: its CPU model, however many vCPUs it has."""

import logging
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import DomainConfig
from qmpvcpu.domainxml import CpuModel, parse, render
from qmpvcpu.errors import ReplayMismatchError, TargetMismatchError
from qmpvcpu.launch import arguments
from qmpvcpu.migration import check_target
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.testing import MicroGuest
from tests.cli.running import run
from tests.exchange import exchange
from tests.launch.vms import started
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu

EPYC = ("-cpu", "EPYC,x2apic=on")


@pytest.mark.parametrize("on", substrates(("q35",)))
async def test_a_vm_that_is_started_from_its_record_has_its_cpu_model(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with (
        MicroGuest(on.qemu, machine="q35", accel=on.accel, extra_args=EPYC) as guest,
        qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm,
    ):
        await vm.plug(5)
        lived = vm.layout
        async with await vm.export(allow_fatal=True) as export:
            state = ExportedState.from_json(export.to_json())
    said = await run("args", record, "--json")
    assert said.document["argv"][:2] == ["-cpu", "EPYC"]
    assert any("which features were requested" in each for each in said.document["unknown"])
    assert state.xml is not None
    for document in (record.read_bytes(), state.xml, render(lived)):
        domain = parse(document)
        assert domain.cpu == CpuModel("custom", "EPYC")
        built = arguments(domain)
        async with started(on, built, *built.argv, "-S") as again:
            assert [slot.type for slot in again.layout.slots] == ["EPYC-x86_64-cpu"] * 8
            assert again.layout.order == lived.order


@pytest.mark.parametrize("on", substrates(("q35",), accels=("tcg",)))
async def test_a_qemu_with_another_cpu_model_is_no_target_and_takes_no_replay(on: Substrate) -> None:
    async with (
        MicroGuest(on.qemu, machine="q35", accel=on.accel, extra_args=EPYC) as guest,
        qmpvcpu.attach(guest.qmp, name="vm") as vm,
    ):
        await vm.plug(5)
        document = render(vm.layout)
        state = ExportedState(vm.layout)
    other = arguments(parse(document), cpu="qemu64")
    async with started(on, other, *other.boot_argv, "-incoming", "defer") as target:
        with pytest.raises(ReplayMismatchError) as caught, exchange() as sent:
            await target.replay(document)
        assert caught.value.differences == ("its CPU model is qemu64, not EPYC (-cpu)",)
        assert "device_add" not in sent
        with pytest.raises(TargetMismatchError, match="CPU type: the source has EPYC-x86_64-cpu, the target qemu64"):
            await check_target(state, target)
    same = arguments(parse(document), cpu="EPYC,x2apic=on")
    async with started(on, same, *same.boot_argv, "-S") as target:
        await target.replay(document)
        assert target.layout.order == (0, 5)


@pytest.mark.parametrize("on", substrates(("q35",), accels=("tcg",))[-1:])
async def test_a_document_of_another_cpu_model_stays_as_it_is_and_is_warned_of(
    on: Substrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = b"<domain type='qemu'><name>vm</name><vcpu>8</vcpu><cpu mode='maximum'/></domain>"
    async with MicroGuest(on.qemu, machine="q35", accel=on.accel, extra_args=EPYC) as guest:
        with caplog.at_level(logging.WARNING, "qmpvcpu.vm"):
            async with qmpvcpu.attach(guest.qmp, name="vm", record=tmp_path / "vm.xml", base=own):
                pass
        (base := tmp_path / "own.xml").write_bytes(own)
        said = await run("xml", "--qmp", guest.qmp, "--base", base, "--json")
    (warning,) = caplog.records
    told = 'the document names the CPU model "max", and QEMU runs EPYC'
    assert told in warning.getMessage()
    assert any(told in each for each in said.document["left_out"])
    assert parse((tmp_path / "vm.xml").read_bytes()).cpu == CpuModel("maximum")


@pytest.mark.parametrize("on", substrates(("q35",), that_survive=True))
async def test_a_record_of_more_than_255_vcpus_is_read_by_args_and_config(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    wide = MicroGuest(
        on.qemu,
        machine="q35",
        accel=on.accel,
        max_vcpus=280,
        extra_args=["-machine", "kernel-irqchip=split", "-cpu", "qemu64,x2apic=on"],
    )
    async with wide as guest:
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
            await vm.plug(270)
        printed = await run("xml", "--qmp", guest.qmp, "--json")
    assert any("<iommu>" in each for each in printed.document["left_out"])
    for path, text in ((record, None), (tmp_path / "printed.xml", printed.document["xml"])):
        if text is not None:
            path.write_text(text)
        said = await run("args", path)
        assert said.code == 0
        assert "-smp 1,maxcpus=280," in said.out
        assert "id=vcpu270," in said.out
        assert "IOMMU, which libvirt requires with eim='on'" in said.err
        shown = await run("config", path)
        assert shown.code == 0
        assert "more than 255 vCPUs" in shown.err
        changed = await run("config", path, "--enable", "271", "--json")
        assert changed.document["enabled"] == "0,270-271"
        assert "more than 255 vCPUs" in changed.document["refused_by_libvirt"][0]
        async with DomainConfig.open(path) as config:
            assert config.domain.enabled == {0, 270, 271}
