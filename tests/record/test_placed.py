"""A record's ``<cputune>`` says where the VM's threads are to run, and what is to be so from the next boot on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu import ConfigDeniedError, DenialReason, DomainConfig, DomainXmlError, RecordError, VcpuMap
from qmpvcpu.domainxml import Instance, parse, placement_of, read_identity, start_of
from qmpvcpu.model.placement import CoreScheduling, Place, Placement
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.domainxml.documents import SAMPLES, outside
from tests.domainxml.examples import layout_of
from tests.record.conftest import OpenRecord
from tests.record.test_in_place import FOUR, vm_of
from tests.record.test_record import LAYOUT

WISH = Placement({3: Place.on("1", "batch")}, Place.on("0"), VcpuMap([0, 1]))
PINS = b"""  <cputune>
    <vcpupin vcpu='3' cpuset='1'/>
    <emulatorpin cpuset='0'/>
    <vcpusched vcpus='3' scheduler='batch'/>
  </cputune>
"""


def said_by(path: Path) -> Placement:
    return placement_of(parse(path.read_bytes()))


def as_said(placement: Placement) -> Placement:
    return replace(placement, everywhere=bool(placement))


async def test_a_record_says_where_threads_are_to_run_also_those_of_vcpus_that_are_not_plugged(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    assert record.placement is None
    await record.write(FOUR, placement=WISH)
    assert record.placement == WISH
    assert 3 not in FOUR.enabled
    assert PINS in path.read_bytes()
    assert b"<vcpu placement='static' cpuset='0-1' current='2'>4</vcpu>" in path.read_bytes()
    assert said_by(path) == as_said(WISH)


async def test_it_is_there_for_the_next_one_and_the_record_is_still_ours_alone(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR, placement=WISH)
    await record.close()
    again = await open_record(path)
    assert again.placement == WISH, "no libvirt has it run on all host CPUs where nothing is said"
    await again.write(FOUR)
    assert PINS in path.read_bytes(), "none was given, so the document keeps its own"
    assert b"in-place" not in path.read_bytes()
    await again.write(FOUR, placement=Placement())
    assert said_by(path) == Placement()
    assert b"cputune" not in path.read_bytes()


async def test_what_libvirt_has_no_word_for_is_no_error(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    wish = replace(WISH, vcpus={**WISH.vcpus, 900: Place.on("1")}, core_scheduling=CoreScheduling.VCPUS)
    await (await open_record(path)).write(FOUR, placement=wish)
    assert said_by(path) == as_said(WISH)


async def test_core_scheduling_is_there_for_the_next_one(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    for wish in (
        replace(WISH, core_scheduling=CoreScheduling.VCPUS),
        Placement(core_scheduling=CoreScheduling.VCPUS),
    ):
        record = await open_record(path)
        await record.write(FOUR, placement=wish)
        await record.close()
        again = await open_record(path)
        assert again.placement == wish
        await again.write(FOUR)
        await again.close()
        assert b'core-scheduling="vcpus"' in path.read_bytes()
    record = await open_record(path)
    await record.write(FOUR, placement=Placement())
    assert b"core-scheduling" not in path.read_bytes()


async def test_the_vms_own_document_follows_and_keeps_all_else(open_record: OpenRecord, tmp_path: Path) -> None:
    document, layout = vm_of("cputune-schedulers")
    path = tmp_path / "vm.xml"
    path.write_bytes(document)
    record = await open_record(path, uuid=layout.vm.uuid, base=path)
    assert record.placement == placement_of(parse(document))
    await record.write(layout)
    assert said_by(path) == placement_of(parse(document))
    assert record.placement is not None
    await record.write(layout, placement=record.placement.with_vcpus({5: Place.on("0")}))
    assert path.read_bytes().count(b"<vcpupin vcpu='5' cpuset='0'/>") == 1
    await record.write(layout, placement=WISH)
    assert said_by(path) == as_said(WISH)
    assert outside(path.read_bytes()) == outside(document)
    for kept in (b"<iothreadpin iothread='1' cpuset='1'/>", b"<iothreadsched iothreads='1' scheduler='batch'/>"):
        assert kept in path.read_bytes()


async def test_pins_that_others_add_to_a_record_are_its_placement(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR)
    await record.close()
    path.write_bytes(path.read_bytes().replace(b"  <os>\n", PINS + b"  <os>\n"))
    again = await open_record(path)
    assert again.placement is not None
    assert again.placement.of_vcpu(3) == Place.on("1", "batch")
    await again.write(FOUR)
    assert PINS in path.read_bytes()


async def test_pins_that_others_add_between_two_saves_stay_until_a_placement_is_given(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR)
    path.write_bytes(path.read_bytes().replace(b"  <os>\n", PINS + b"  <os>\n"))
    await record.write(FOUR)
    assert PINS in path.read_bytes()
    await record.write(FOUR, placement=Placement.pinned({0: "1"}))
    assert said_by(path) == as_said(Placement.pinned({0: "1"}))


@pytest.mark.parametrize("starts", [True, False], ids=["as a base", "as a record"])
async def test_a_priority_that_no_kernel_has_is_told(
    open_record: OpenRecord, tmp_path: Path, *, starts: bool
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR, placement=Placement({3: Place.on("1", "fifo:99")}))
    await record.close()
    wrong = path.read_bytes().replace(b"'99'", b"'100'")
    path.write_bytes(wrong)
    other = tmp_path / "other.xml" if starts else path
    with pytest.raises(RecordError, match="<vcpusched> of vCPU 3: a priority is 1 to 99"):
        await open_record(other, base=path if starts else None)
    assert path.read_bytes() == wrong


# The next boot.


async def a_record(tmp_path: Path, placement: Placement | None = WISH) -> Path:
    record = await Record.open(tmp_path / "vm.xml", Claim("vm", instance=Instance(7, 8)))
    await record.write(LAYOUT, placement=placement)
    await record.close()
    return record.path


async def test_the_next_boot_in_a_record_has_places_of_its_own(tmp_path: Path) -> None:
    path = await a_record(tmp_path)
    async with DomainConfig.open(path) as config:
        assert config.placement == as_said(WISH)
        config.place(Placement({1: Place.on("1"), 3: Place(scheduler=WISH.vcpus[3].scheduler)}))
        wanted = as_said(WISH.with_vcpus({1: Place.on("1")}))
        assert config.placement == wanted
        assert config.changed
        await config.save()
        assert config.placement == wanted
        assert not config.changed
    assert said_by(path) == as_said(WISH), "<cputune> is of the VM as it runs"
    metadata = read_identity(path.read_bytes()).metadata
    assert metadata is not None
    assert metadata.next_boot is None, "which vCPUs it has still follows the VM"
    assert placement_of(start_of(parse(path.read_bytes()))) == wanted
    record = await Record.open(path, Claim("vm", instance=Instance(7, 8)))
    assert record.placement == WISH
    await record.write(layout_of(4, [0], boot=1), placement=record.placement)
    await record.close()
    assert (await DomainConfig.load(path)).placement == wanted, "it survives what happens to the VM"


async def test_another_qemu_of_the_vm_has_the_places_of_the_next_boot(tmp_path: Path) -> None:
    path = await a_record(tmp_path)
    async with DomainConfig.open(path) as config:
        config.placement = Placement.pinned({0: "1"})
        await config.save()
    other = await Record.open(path, Claim("vm", instance=Instance(9, 10)))
    assert other.placement == Placement.pinned({0: "1"})
    await other.close()


async def test_without_places_of_its_own_the_next_boot_follows_the_vm_as_it_runs(tmp_path: Path) -> None:
    path = await a_record(tmp_path)
    async with DomainConfig.open(path) as config:
        config.set_map("0,3")
        await config.save()
        assert config.placement == as_said(WISH)
    metadata = read_identity(path.read_bytes()).metadata
    assert metadata is not None
    assert (metadata.next_boot, metadata.next_placement) == (VcpuMap([0, 3]), None)
    record = await Record.open(path, Claim("vm", instance=Instance(7, 8)))
    await record.write(LAYOUT, placement=Placement.pinned({0: "1"}))
    await record.close()
    assert (await DomainConfig.load(path)).placement == as_said(Placement.pinned({0: "1"}))


DOCUMENT = SAMPLES["cputune-schedulers"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A document of somebody's."""
    path = tmp_path / "config.xml"
    path.write_bytes(DOCUMENT)
    return path


async def test_places_are_changed_in_a_document_and_no_other_byte(path: Path) -> None:
    async with DomainConfig.open(path) as config:
        config.place(Placement({5: Place.on("1"), 2: Place(scheduler=WISH.vcpus[3].scheduler)}))
        await config.save()
    assert path.read_bytes() == DOCUMENT.replace(
        b"    <emulatorpin", b"    <vcpupin vcpu='5' cpuset='1'/>\n    <emulatorpin"
    ).replace(
        b"    <vcpusched vcpus='2' scheduler='fifo' priority='1'/>\n",
        b"    <vcpusched vcpus='2' scheduler='batch'/>\n",
    )


async def test_a_scheduler_of_the_kernels_own_ends_another(path: Path) -> None:
    config = await DomainConfig.load(path)
    config.place(Placement({1: Place.on("1", "other")}, Place.on("0", "other")))
    assert set(config.domain.scheds) == {0, 2, 4}
    assert config.domain.emulator_sched is None


async def test_setting_it_replaces_all_of_it(path: Path) -> None:
    config = await DomainConfig.load(path)
    config.placement = Placement()
    assert config.placement == Placement()
    assert b"vcpupin" not in config.to_bytes()
    assert b"<iothreadpin" in config.to_bytes()


DENIED: dict[str, tuple[Callable[[DomainConfig], None], type[Exception], str]] = {
    "a vCPU that cannot be": (
        lambda config: config.place(Placement.pinned({5: "0", 6: "0"})),
        ConfigDeniedError,
        "the document has vCPUs 0 to 5",
    ),
    "one that no VM has": (
        lambda config: config.place(Placement.pinned({99999: "0"})),
        ConfigDeniedError,
        "the document has vCPUs 0 to 5",
    ),
    "sets that overlap with what stays": (
        lambda config: config.place(Placement.pinned({3: "1"}, exclusive=True)),
        ValueError,
        "vCPU 1 and vCPU 3 must not share host CPUs",
    ),
    "no placement": (lambda config: config.place("1"), TypeError, "placement"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", DENIED)
async def test_what_cannot_be_is_denied_and_changes_nothing(path: Path, case: str) -> None:
    place, kind, told = DENIED[case]
    config = await DomainConfig.load(path)
    with pytest.raises(kind, match=told) as caught:
        place(config)
    if isinstance(caught.value, ConfigDeniedError):
        assert caught.value.reason is DenialReason.UNKNOWN_VCPU
    assert not config.changed


async def test_a_lower_maximum_drops_the_places_above_it(path: Path) -> None:
    config = await DomainConfig.load(path)
    config.set_max(2)
    assert set(config.placement.vcpus) == {0, 1}
    await config.save()
    assert set(said_by(path).vcpus) == {0, 1}


async def test_a_document_with_a_priority_that_no_kernel_has_shows_no_placement(path: Path) -> None:
    path.write_bytes(DOCUMENT.replace(b"priority='99'", b"priority='0'"))
    config = await DomainConfig.load(path)
    config.set_count(4)
    with pytest.raises(DomainXmlError, match="<vcpusched> of vCPU 1: a priority is 1 to 99"):
        _ = config.placement
    with pytest.raises(DomainXmlError, match="<vcpusched> of vCPU 1: a priority is 1 to 99"):
        config.place(Placement())
    await config.save()
