"""Real QEMUs are started with the machine alone, and the vCPUs plugged into them again while they are stopped."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import DomainXmlError, Outcome, Plugged, Recovery, Rejected, TransitionError, TransitionOutcome
from qmpvcpu.domainxml import NumaCell, render
from qmpvcpu.errors import ReplayMismatchError
from qmpvcpu.launch import arguments
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.peer import Command, ScriptedPeer
from tests.captures import all_captures
from tests.controller.vms import other_client
from tests.exchange import exchange
from tests.launch.domains import EIGHT, STATES, domain_of
from tests.launch.vms import assert_is, qemu_of, started
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu

BACKWARDS = STATES["plugged backwards"]
EVERY = substrates(("q35",))


def added(sent: list[str]) -> int:
    return sent.count("device_add")


@pytest.mark.parametrize("on", [*EVERY, *substrates(("pc",), accels=("kvm",))])
@pytest.mark.parametrize("state", STATES)
async def test_a_stopped_qemu_gets_the_same_slots_in_the_same_order(on: Substrate, state: str) -> None:
    domain = STATES[state]
    built = arguments(domain)
    async with started(on, built, *built.boot_argv, "-S") as vm:
        with exchange() as sent:
            report = await vm.replay(domain)
        assert_is(vm.layout, domain)
        assert report.outcome is TransitionOutcome.REACHED
        assert [step.ids for step in report.steps] == [VcpuMap([each]) for each in domain.order]
        assert report.layout == vm.layout
        assert added(sent) == len(domain.order)
        # It is so now: nothing more is sent, whoever asks.
        with exchange() as sent:
            assert (await vm.replay(domain)).steps == ()
            assert (await vm.replay(vm.layout)).steps == ()
        assert added(sent) == 0


@pytest.mark.parametrize("on", EVERY)
async def test_a_layout_that_lived_is_rebuilt_from_its_layout_and_from_its_document(on: Substrate) -> None:
    async with (
        MicroGuest(on.qemu, machine="q35", accel=on.accel, boot=3) as guest,
        qmpvcpu.attach(guest.qmp, name="vm") as vm,
    ):
        for each in (6, 4, 5):
            await vm.plug(each)
        if on.survives_plug_after_unplug:
            await vm.unplug(4)
            await vm.unplug(1)
        lived = vm.layout
        xml = render(lived)
    assert lived.order == ((0, 2, 6, 5) if on.survives_plug_after_unplug else (0, 1, 2, 6, 4, 5))
    for source in (lived, xml):
        built = arguments(lived)
        async with started(on, built, *built.boot_argv, "-S") as vm:
            await vm.replay(source)
            assert vm.layout.enabled == lived.enabled
            assert vm.layout.order == lived.order
            assert [slot.props for slot in vm.layout.slots] == [slot.props for slot in lived.slots]


@pytest.mark.parametrize("on", EVERY)
@pytest.mark.parametrize("incoming", ["defer", "unix:incoming"])
async def test_a_qemu_that_waits_for_a_migration_takes_a_replay(on: Substrate, incoming: str) -> None:
    built = arguments(BACKWARDS)
    async with started(on, built, *built.boot_argv, "-incoming", incoming) as vm:
        await vm.replay(BACKWARDS)
        assert_is(vm.layout, BACKWARDS)


@pytest.mark.parametrize("on", EVERY)
async def test_a_vm_that_was_paused_takes_a_replay_and_its_guest_gets_the_vcpus_when_it_goes_on(
    on: Substrate,
) -> None:
    domain = domain_of(8, 1, [5, 2], topology=EIGHT)
    async with MicroGuest(on.qemu, machine="q35", accel=on.accel) as guest, qmpvcpu.attach(guest.qmp) as vm:
        with pytest.raises(ReplayMismatchError, match="it is running, not stopped") as caught, exchange() as sent:
            await vm.replay(domain)
        assert caught.value.outcome is Outcome.UNCHANGED
        assert added(sent) == 0
        async with other_client(guest) as other:
            await other.execute("stop")
            await vm.replay(domain)
            assert_is(vm.layout, domain)
            await other.execute("cont")
        await vm.wait_for(lambda layout: layout[5].acknowledged and layout[2].acknowledged, timeout=20)


@pytest.mark.parametrize("on", EVERY)
@pytest.mark.parametrize("done", [1, 6])
async def test_a_replay_goes_on_where_the_command_line_or_another_replay_ended(on: Substrate, done: int) -> None:
    built = arguments(BACKWARDS)
    begun = built.device_argv[: 2 * done]
    async with started(on, built, *built.boot_argv, *begun, "-S") as vm:
        with exchange() as sent:
            await vm.replay(BACKWARDS)
        assert added(sent) == 7 - done
        assert_is(vm.layout, BACKWARDS)


ONE = substrates(("q35",), accels=("tcg",))[-1:]


@pytest.mark.parametrize("on", ONE)
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (domain_of(16, 1, [7]), "it can have 8 vCPUs, not 16"),
        (domain_of(8, 2, [7]), "started with vCPU 0, not with vCPUs 0-1"),
        (domain_of(8, 1, [6, 7]), "created as 0,7, which is not how 0,6,7 begins"),
        (domain_of(8, 1, [7], topology=Topology(8, sockets=8)), "sockets 2, not 8"),
        (
            domain_of(8, 1, [7], numa=(NumaCell(0, VcpuMap(range(8)), 16384),)),
            "vCPUs 0-7 are in other NUMA cells: vCPU 0 is in none, not in cell 0",
        ),
    ],
)
async def test_another_vms_vcpus_are_refused_before_anything_is_sent(on: Substrate, asked: Any, words: str) -> None:
    built = arguments(domain_of(8, 1, [7], topology=EIGHT))
    async with started(on, built, *built.argv, "-S") as vm:
        with pytest.raises(ReplayMismatchError) as caught, exchange() as sent:
            await vm.replay(asked)
        (difference,) = caught.value.differences
        assert words in difference
        assert added(sent) == 0
        assert vm.layout.order == (0, 7)


@pytest.mark.parametrize("on", ONE)
async def test_another_cpu_model_is_refused(on: Substrate) -> None:
    built = arguments(BACKWARDS)
    async with started(on, built, *built.argv, "-S") as vm:
        lived = vm.layout
    other = arguments(BACKWARDS, cpu="max")
    async with started(on, other, *other.boot_argv, "-S") as vm:
        with pytest.raises(ReplayMismatchError, match=r"another CPU type: .* max-x86_64-cpu .* qemu64-x86_64-cpu"):
            await vm.replay(lived)
        assert vm.layout.order == (0,)


@pytest.mark.parametrize("on", ONE)
async def test_what_is_no_document_is_refused(on: Substrate) -> None:
    built = arguments(BACKWARDS)
    async with started(on, built, *built.boot_argv, "-S") as vm:
        with pytest.raises(DomainXmlError):
            await vm.replay(b"<domain")
        path: Any = "vm.xml"
        with pytest.raises(TypeError, match="bytes"):
            await vm.replay(path)


@pytest.mark.parametrize("on", substrates(("q35",), accels=("kvm",)))
async def test_a_replay_whose_process_dies_is_finished_in_its_order(on: Substrate, tmp_path: Path) -> None:
    built = arguments(BACKWARDS)
    record, document = tmp_path / "vm.xml", tmp_path / "source.xml"
    async with started(on, built, *built.argv, "-S") as vm:
        document.write_bytes(render(vm.layout))
    async with qemu_of(on, built, *built.boot_argv, "-S") as process:
        await process.wait_ready()
        dying = (
            f"import asyncio, os, pathlib, qmpvcpu\n"
            f"async def main():\n"
            f"    vm = await qmpvcpu.attach({str(process.qmp)!r}, record={str(record)!r})\n"
            f"    source = pathlib.Path({str(document)!r}).read_bytes()\n"
            f"    asyncio.create_task(vm.replay(source, in_flight=1))\n"
            f"    await vm.wait_for(lambda layout: len(layout.enabled) > 2)\n"
            f"    os._exit(9)\n"
            f"asyncio.run(main())\n"
        )
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", dying)
        assert await child.wait() == 9
        async with qmpvcpu.attach(process.qmp, record=record) as vm:
            assert vm.interrupted is not None
            assert vm.interrupted.target == BACKWARDS.enabled
            begun = len(vm.layout.enabled)
            assert 2 < begun < 8
            assert vm.layout.order == (0, *BACKWARDS.order)[:begun]
            report = await vm.recover(Recovery.FINISH)
            assert report is not None
            assert report.outcome is TransitionOutcome.REACHED
            await vm.refresh()
            assert_is(vm.layout, BACKWARDS)
            assert vm.interrupted is None
        assert b"<vcpu id='7' enabled='yes' hotpluggable='yes' order='2'/>" in record.read_bytes()


@pytest.mark.parametrize("on", ONE)
async def test_what_qemu_rejects_ends_the_replay_and_the_report_tells_how_far_it_came(on: Substrate) -> None:
    domain = domain_of(8, 1, [5, 6, 7], topology=EIGHT)
    built = arguments(domain)
    port = ["-device", "pcie-root-port,id=port1,chassis=1"]
    async with started(on, built, *built.boot_argv, "-S", *port) as vm:
        other = {"driver": "virtio-rng-pci", "id": "vcpu6", "bus": "port1"}  # since we came: it was not seen
        await vm._driver.connection.monitor.execute("device_add", other)
        with pytest.raises(TransitionError) as caught, exchange() as sent:
            await vm.replay(domain, in_flight=1)
        first, second, third = caught.value.report.steps
        assert isinstance(first.verdict, Plugged)
        assert isinstance(second.verdict, Rejected)
        assert "Duplicate device ID" in second.reason
        assert third.verdict is None
        assert added(sent) == 2
        assert vm.layout.order == (0, 5)


class Pseries:
    """A pseries that takes cores, as recorded from QEMU 10.0 with threads=4, and lists them in its own order."""

    def __init__(self, *, backwards: bool = False) -> None:
        capture = next(each for each in all_captures() if each.name == "10.0.2-pseries-threads4")
        self.slots: list[dict[str, Any]] = [dict(slot) for slot in capture.replies("query-hotpluggable-cpus")[0]]
        self.threads = list(capture.replies("query-cpus-fast")[0])
        self.added: list[dict[str, Any]] = []
        self._place = len(self.threads) if backwards else None

    @property
    def answers(self) -> dict[str, Any]:
        return {
            "query-status": {"status": "prelaunch", "running": False},
            "query-target": {"arch": "ppc64"},
            "query-migrate": {},
            "query-kvm": {"enabled": True, "present": True},
            "query-hotpluggable-cpus": lambda _: self.slots,
            "query-cpus-fast": lambda _: self.threads,
            "device_add": self.add,
        }

    def add(self, command: Command) -> Any:
        self.added.append(dict(command.arguments))
        core = command.arguments["core-id"]
        slot = next(slot for slot in self.slots if slot["props"]["core-id"] == core)
        slot["qom-path"] = f"/machine/peripheral/{command.arguments['id']}"
        place = len(self.threads) if self._place is None else self._place
        self.threads[place:place] = [
            {"thread-id": 9000 + core + n, "qom-path": f"{slot['qom-path']}/thread[{n}]", "cpu-index": core + n}
            for n in range(4)
        ]
        return {}


CORES = domain_of(16, 4, [8, 9, 10, 11, 4, 5, 6, 7], arch="ppc64", machine="pseries", type="kvm")


async def test_a_pseries_is_given_whole_cores_of_the_type_that_it_names() -> None:
    machine = Pseries()
    async with ScriptedPeer(answers=machine.answers, reject_others=True) as peer, qmpvcpu.attach(peer.address) as vm:
        report = await vm.replay(CORES)
        assert vm.layout.order == (0, 8, 4)
    assert [str(step.ids) for step in report.steps] == ["8-11", "4-7"]
    kind = "power10_v2.0-spapr-cpu-core"
    assert machine.added == [
        {"driver": kind, "id": "vcpu8", "core-id": 8, "node-id": 0},
        {"driver": kind, "id": "vcpu4", "core-id": 4, "node-id": 0},
    ]


async def test_a_qemu_that_says_another_order_at_the_end_is_not_believed_to_be_the_same() -> None:
    machine = Pseries(backwards=True)
    async with ScriptedPeer(answers=machine.answers, reject_others=True) as peer, qmpvcpu.attach(peer.address) as vm:
        with pytest.raises(ReplayMismatchError, match="created as 0,4,8") as caught:
            await vm.replay(CORES)
        assert caught.value.outcome is Outcome.CHANGED
