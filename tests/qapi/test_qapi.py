"""qapi: QEMU's JSON, as recorded, and JSON that no QEMU should send."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import MalformedReplyError, qapi
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import Topology
from tests.captures import FOLDER, all_captures

CPU_ANSWER = {"slot-type": "CPU", "slot": "3", "source": 1, "status": 0}
ENTRY = {"props": {"core-id": 1, "socket-id": 0}, "vcpus-count": 1, "type": "t-x86_64-cpu"}
WIRES = [path for path in sorted(FOLDER.glob("*wire*.json")) if "qtest" not in path.stem and "stats" not in path.stem]


@pytest.mark.parametrize("path", WIRES, ids=lambda path: path.stem)
def test_our_commands_are_word_for_word_what_a_real_qemu_took(path: Any) -> None:
    wire = json.loads(path.read_text())["wire"]
    sent = {m["msg"]["id"]: m["msg"] for m in wire if m["dir"] == ">"}
    replies = {m["msg"].get("id"): m["msg"] for m in wire if m["dir"] == "<" and "id" in m["msg"]}
    slots: tuple[Any, ...] = ()
    checked = 0
    for key, command in sent.items():
        reply = replies.get(key, {})
        if command["execute"] == "query-hotpluggable-cpus" and "return" in reply:
            slots = qapi.parse_hotpluggable_cpus(reply["return"])
        if command["execute"] == "device_add" and "return" in reply and slots:
            arguments = dict(command["arguments"])
            ours = [
                qapi.device_add(Slot(0, reading.vcpus, reading.type, reading.props, 0))
                for reading in slots
                if all(arguments.get(name) == value for name, value in reading.props.items())
            ]
            if ours:
                assert len(ours) == 1
                assert {**ours[0], "id": arguments["id"]} == arguments
                checked += 1
    assert checked or not slots


def test_device_del_names_the_id_or_else_the_path() -> None:
    slot = Slot(3, 1, "t", CpuProps({"core-id": 3}), 3)
    assert qapi.device_add(slot) == {"driver": "t", "id": "vcpu3", "core-id": 3}
    assert qapi.device_del(slot.filled("/machine/peripheral/mine")) == {"id": "mine"}
    boot = "/machine/unattached/device[4]"
    assert qapi.device_del(slot.filled(boot)) == {"id": boot}
    anon = "/machine/peripheral-anon/device[1]"
    assert qapi.device_del(slot.filled(anon)) == {"id": anon}


@pytest.mark.parametrize(
    "entry",
    [
        {**ENTRY, "type": None},
        {**ENTRY, "type": ""},
        {**ENTRY, "type": "vfio-pci"},
        {**ENTRY, "type": "vfio-pci,host=0000:01:00.0"},
        {**ENTRY, "type": "host,+vmx-x86_64-cpu"},
        {**ENTRY, "type": "host-x86_64-cpu\n"},
        {**ENTRY, "type": "a" * 200 + "-x86_64-cpu"},
        {**ENTRY, "vcpus-count": 0},
        {**ENTRY, "vcpus-count": True},
        {**ENTRY, "vcpus-count": "1"},
        {**ENTRY, "vcpus-count": 1.0},
        {**ENTRY, "vcpus-count": 16384},  # with the first entry, one too many
        {**ENTRY, "vcpus-count": 10**18},
        {**ENTRY, "type": "t,id=x"},
        {**ENTRY, "type": "t" * 257},
        {**ENTRY, "type": "\ud800"},
        {**ENTRY, "qom-path": None},
        {**ENTRY, "qom-path": "no/path"},
        {**ENTRY, "qom-path": "/machine/\x1b[31m"},
        {**ENTRY, "qom-path": "/" + "x" * 1024},
        {**ENTRY, "props": {"core-id": -1}},
        {**ENTRY, "props": {"core-id": True}},
        {**ENTRY, "props": {"core-id": "1"}},
        {**ENTRY, "props": {"core-id": 1.5}},
        {**ENTRY, "props": {"core-id": 10**30}},
        {**ENTRY, "props": {"core-id": 1, "driver": "virtio-9p-pci"}},
        {**ENTRY, "props": {"core-id": 1, "id": "x"}},
        {**ENTRY, "props": {"core-id": 1, "x": [[]]}},
        {**ENTRY, "props": {"core-id": 1, "x": "a,b"}},
        {**ENTRY, "props": {"core-id": 1, "a b": 1}},
        {**ENTRY, "props": {f"x{n}-id": n for n in range(33)} | {"core-id": 1}},
        {**ENTRY, "props": {}},
        {**ENTRY, "props": []},
        {**ENTRY, "props": {"core-id": "0,x=y"}},
        {**ENTRY, "props": {"core-id": 0, "id": 7}},
        {**ENTRY, "props": {"core-id": 0, "driver": "virtio-9p-pci,fsdev=root"}},
        {**ENTRY, "qom-path": 7},
        {**ENTRY, "qom-path": ""},
        {**ENTRY, "qom-path": "/machine/peripheral/a b"},
        {**ENTRY, "qom-path": "/machine/peripheral/7up"},
        {**ENTRY, "qom-path": "vcpu3"},
        "text",
    ],
)
def test_a_malformed_slot_is_refused_with_the_entry_in_the_error(entry: Any) -> None:
    with pytest.raises(MalformedReplyError, match="malformed reply to query-hotpluggable-cpus") as caught:
        qapi.parse_hotpluggable_cpus([ENTRY, entry])
    assert caught.value.reply == entry


@pytest.mark.parametrize("reply", [None, {}, 7, "x"])
def test_a_reply_that_is_no_list_is_refused(reply: Any) -> None:
    for parse in (qapi.parse_hotpluggable_cpus, qapi.parse_cpus_fast, qapi.parse_ospm_status):
        with pytest.raises(MalformedReplyError, match="not a list"):
            parse(reply)


@pytest.mark.parametrize("missing", ["qom-path", "thread-id", "cpu-index"])
def test_a_malformed_thread_is_refused(missing: str) -> None:
    entry: dict[str, Any] = {"qom-path": "/a", "thread-id": 1, "cpu-index": 0}
    (thread,) = qapi.parse_cpus_fast([entry])
    assert thread.props == {}
    with pytest.raises(MalformedReplyError, match="does not name the place of a CPU"):
        qapi.parse_cpus_fast([{**entry, "props": {"id": 1}}])
    del entry[missing]
    with pytest.raises(MalformedReplyError, match=f"'{missing}' is no"):
        qapi.parse_cpus_fast([entry])


def test_two_slots_cannot_hold_the_same_cpu() -> None:
    entry = {**ENTRY, "qom-path": "/machine/peripheral/vcpu1"}
    with pytest.raises(MalformedReplyError, match="two entries have this 'qom-path'"):
        qapi.parse_hotpluggable_cpus([entry, entry])


def test_a_property_that_a_later_qemu_adds_is_passed_through() -> None:
    props = {"core-id": 1, "cache-id": 7}
    (reading,) = qapi.parse_hotpluggable_cpus([{**ENTRY, "props": props}])
    assert dict(reading.props) == props


@pytest.mark.parametrize("parse", [qapi.parse_hotpluggable_cpus, qapi.parse_cpus_fast, qapi.parse_ospm_status])
def test_a_list_of_more_entries_than_a_vm_has_vcpus_is_refused(parse: Callable[[object], object]) -> None:
    with pytest.raises(MalformedReplyError, match="more than 16384 entries"):
        parse([{}] * 16385)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thread-id", -1),
        ("thread-id", 2**31),
        ("thread-id", True),
        pytest.param("thread-id", 10**5000, id="5001 digits"),
        ("cpu-index", 16384),
        ("cpu-index", 1e999),
        ("cpu-index", False),
        ("props", []),
        ("target", "x86_64;"),
        ("target", None),
        ("qom-path", "/machine/\ud800"),
    ],
)
def test_a_thread_that_is_out_of_bounds_is_refused_and_the_key_is_named(key: str, value: object) -> None:
    entry = {"qom-path": "/a", "thread-id": 1, "cpu-index": 0, key: value}
    with pytest.raises(MalformedReplyError, match=f"'{key}' is no") as caught:
        qapi.parse_cpus_fast([entry])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("slot", "9" * 5000),
        ("slot", "16384"),
        ("slot", "-1"),
        ("slot", 3),
        ("source", -1),
        ("source", 2**32),
        ("status", True),
        ("status", 0.5),
    ],
)
def test_an_answer_that_is_out_of_bounds_is_no_answer(key: str, value: object) -> None:
    answer = {**CPU_ANSWER, key: value}
    with pytest.raises(MalformedReplyError, match=f"'{key}' is no"):
        qapi.parse_ospm_status([answer])
    assert qapi.parse_event({"event": "ACPI_DEVICE_OST", "data": {"info": answer}}) is None


@pytest.mark.parametrize(
    ("parse", "reply", "key"),
    [
        (qapi.parse_topology, {"maxcpus": 10**18}, "maxcpus"),
        (qapi.parse_topology, {"maxcpus": 4, "cores": 0}, "cores"),
        (qapi.parse_topology, {"maxcpus": 4, "threads": True}, "threads"),
        (qapi.parse_feature_words, [{"cpuid-input-eax": 1, "features": -1}], "features"),
        (qapi.parse_feature_words, [{"cpuid-input-eax": 1, "features": 1 << 64}], "features"),
        (qapi.parse_feature_words, [{"cpuid-input-eax": "1", "features": 1}], "cpuid-input-eax"),
        (qapi.parse_memory_kib, {"base-memory": 10**30}, "base-memory"),
        (qapi.parse_memory_kib, {"base-memory": 1, "plugged-memory": -1}, "plugged-memory"),
        (qapi.parse_name, {"name": 5}, "name"),
        (qapi.parse_name, {"name": "x" * 4097}, "name"),
        (qapi.parse_name, {"name": "\udfff"}, "name"),
        (qapi.parse_uuid, {"UUID": "x"}, "UUID"),
        (qapi.parse_arch, {"arch": "a/b"}, "arch"),
        (qapi.parse_machine, "pc\n", "type"),
        (lambda reply: qapi.parse_status("query-status", reply), {"status": "\x1b"}, "status"),
        (lambda reply: qapi.parse_status("query-status", reply), {}, "status"),
        (lambda reply: qapi.parse_version("query-version", reply), {"qemu": {"major": math.inf}}, "major"),
        (lambda reply: qapi.parse_version("query-version", reply), {"qemu": {"major": "10"}}, "major"),
        (
            lambda reply: qapi.parse_version("query-version", reply),
            {"qemu": {"major": 10, "minor": 0, "micro": 10**30}},
            "micro",
        ),
    ],
)
def test_what_never_changes_is_bounded_too(parse: Callable[[object], object], reply: object, key: str) -> None:
    with pytest.raises(MalformedReplyError, match=f"'{key}' is no"):
        parse(reply)


def stats(value: object, *, path: object = "/machine/peripheral/vcpu3", name: object = "exits") -> dict[str, Any]:
    return {"provider": "kvm", "qom-path": path, "stats": [{"name": name, "value": value}]}


def test_kvm_tells_how_often_each_vcpu_has_left_guest_mode() -> None:
    recorded = json.loads((FOLDER / "10.0.2-wire-q35-kvm-query-stats.json").read_text())["wire"]
    assert qapi.parse_exits(recorded[-1]["msg"]["return"]) == {"/machine/unattached/device[0]": 0}
    asked = recorded[-2]["msg"]["arguments"]
    ours = qapi.query_exits(asked["vcpus"])
    assert {**ours, "providers": [{**ours["providers"][0], "names": asked["providers"][0]["names"]}]} == asked
    power = stats(7, path="/machine/unattached/device[1]/thread[0]", name="sum_exits")
    other = [{"provider": "cryptodev", "stats": []}, stats(9, path="/other", name="halt_exits")]
    assert qapi.parse_exits([stats(2**64 - 1), power, *other]) == {
        "/machine/peripheral/vcpu3": 2**64 - 1,
        "/machine/unattached/device[1]/thread[0]": 7,
    }
    assert qapi.parse_exits([]) == {}


@pytest.mark.parametrize(
    "entry",
    [
        stats(-1),
        stats(2**64),
        stats(value=True),
        stats(1.0),
        stats("1"),
        stats(None),
        stats([0, 5, 1]),  # a histogram
        stats(1, path=None),
        stats(1, path="vcpu3"),
        {"provider": "kvm", "qom-path": "/a"},
        {"provider": "kvm", "qom-path": "/a", "stats": {}},
        {"provider": "kvm", "qom-path": "/a", "stats": [7]},
        {"provider": "kvm", "qom-path": "/a", "stats": [{"name": "exits"}]},
        {"provider": "kvm", "qom-path": "/a", "stats": [{"name": "exits", "value": 0}] * 2},
        "text",
    ],
)
def test_exits_that_no_vcpu_can_have_are_refused(entry: Any) -> None:
    with pytest.raises(MalformedReplyError, match="malformed reply to query-stats"):
        qapi.parse_exits([entry])


def test_exits_told_twice_and_of_more_vcpus_than_there_can_be_are_refused() -> None:
    with pytest.raises(MalformedReplyError, match="'qom-path' is told twice"):
        qapi.parse_exits([stats(0), stats(1)])
    with pytest.raises(MalformedReplyError, match="more than 16384 entries"):
        qapi.parse_exits([{}] * 16385)
    with pytest.raises(MalformedReplyError, match="not a list"):
        qapi.parse_exits({})


def test_all_that_kvm_counts_is_read_by_name() -> None:
    hist = stats([0, 5, 1], path="/machine/unattached/device[0]", name="halt_wait_hist")
    reply = [stats(7), hist, {"provider": "cryptodev", "stats": "anything"}]
    assert qapi.parse_stats(reply) == {
        "/machine/peripheral/vcpu3": {"exits": 7},
        "/machine/unattached/device[0]": {"halt_wait_hist": (0, 5, 1)},
    }
    assert qapi.query_stats() == {"target": "vcpu"}
    assert qapi.query_stats(["/a"], ["exits"])["vcpus"] == ["/a"]


@pytest.mark.parametrize(
    "entry",
    [
        stats(1.5),
        stats({"deep": 1}),
        stats([[1]]),
        stats([-1]),
        stats([0] * 1025),
        stats(1, name="\x1b[31m"),
        stats(1, name=["exits"]),
        stats(1, name=None),
        stats(1, path="\x1b"),
        {"provider": "kvm", "qom-path": "/a", "stats": [{"value": 0}]},
        {"provider": "kvm", "qom-path": "/a", "stats": [{"name": "exits"}]},
        {"provider": "kvm", "qom-path": "/a", "stats": [{"name": "exits", "value": 0}] * 2},
        {"provider": "kvm", "qom-path": "/a", "stats": [{"name": f"n{n}", "value": 0} for n in range(513)]},
        {"provider": "kvm", "qom-path": "/a", "stats": ["exits"]},
        {"provider": "kvm", "qom-path": "/a", "stats": 7},
    ],
)
def test_what_kvm_cannot_count_is_refused(entry: Any) -> None:
    with pytest.raises(MalformedReplyError, match="malformed reply to query-stats") as caught:
        qapi.parse_stats([entry])
    assert "\x1b" not in str(caught.value)


def test_a_core_has_a_path_for_each_of_its_threads() -> None:
    x86 = Slot(3, 1, "qemu64-x86_64-cpu", CpuProps({"core-id": 3}), 3).filled("/machine/peripheral/vcpu3")
    assert qapi.vcpu_paths(x86) == ["/machine/peripheral/vcpu3"]
    power = Slot(2, 2, "power10_v2.0-spapr-cpu-core", CpuProps({"core-id": 2}), 2).filled("/machine/peripheral/vcpu2")
    assert qapi.vcpu_paths(power) == [f"/machine/peripheral/vcpu2/thread[{number}]" for number in (0, 1)]


def test_what_qemu_does_not_tell_is_not_known() -> None:
    assert qapi.parse_memory_kib({}) is None
    assert qapi.parse_memory_kib({"base-memory": 4096, "plugged-memory": 1024}) == 5
    assert qapi.parse_name({}) is None
    assert qapi.parse_name({"name": ""}) is None
    assert qapi.parse_name({"name": "a\nb"}) == "a\nb"
    assert qapi.parse_uuid(None) is None
    assert qapi.parse_uuid({"UUID": "00000000-0000-0000-0000-000000000000"}) is None
    assert qapi.parse_arch(None) is None
    assert qapi.parse_machine(None) is None
    assert qapi.parse_machine("pc-q35-10.0-machine") == "pc-q35-10.0"
    assert qapi.parse_version("query-version", {"qemu": {"major": 11, "minor": 1, "micro": 3}}) == ((11, 1, 3), "")
    for version in (None, {}, {"qemu": 10}):
        with pytest.raises(MalformedReplyError, match="no QEMU version"):
            qapi.parse_version("query-version", version)
    with pytest.raises(MalformedReplyError, match="not an object"):
        qapi.parse_status("query-status", [])


def words(ecx: int = 0, kvm: int = 0, amd: int = 0) -> list[dict[str, Any]]:
    """Feature words in the order and shape of QEMU's (11.1.3), but for those that nobody reads."""
    return [
        {"cpuid-register": "EDX", "cpuid-input-eax": 0x4000_0001, "features": 1},
        {"cpuid-register": "EAX", "cpuid-input-eax": 0x4000_0001, "features": kvm},
        {"cpuid-register": "ECX", "cpuid-input-eax": 0x8000_0001, "features": amd},
        {"cpuid-register": "EDX", "cpuid-input-eax": 0x8000_0001, "features": 0x2010_0800},
        {"cpuid-register": "EBX", "cpuid-input-eax": 7, "cpuid-input-ecx": 0, "features": 0},
        {"cpuid-register": "ECX", "cpuid-input-eax": 1, "features": ecx},
        {"cpuid-register": "EDX", "cpuid-input-eax": 1, "features": 0x0F8B_FBFD},
    ]


@pytest.mark.parametrize(
    ("reply", "shows"),
    [
        (words(0x8020_2001, 0x0100_007B, 1), {"hypervisor", "kvm", "x2apic"}),  # qemu64 under KVM, as measured
        (words(0x0020_2001, 0x0100_007B, 1), {"kvm", "x2apic"}),  # with hypervisor=off
        (words(0x8020_2001, 0, 1), {"hypervisor", "x2apic"}),  # with kvm=off
        (words(0x8000_2001, 1, 5), {"hypervisor", "kvm", "nested"}),  # svm
        (words(0x8000_2021, 1, 1), {"hypervisor", "kvm", "nested"}),  # vmx
        ([], {"hypervisor"}),  # unknown is not hidden
    ],
)
def test_a_cpus_feature_words_tell_what_it_shows(reply: object, shows: set[str]) -> None:
    found = qapi.parse_feature_words(reply)
    assert found is not None
    assert {name for name, value in found._asdict().items() if value} == shows


@pytest.mark.parametrize("reply", [None, "words", {}, 1])
def test_what_has_no_feature_words_shows_nothing(reply: object) -> None:
    assert qapi.parse_feature_words(reply) is None


@pytest.mark.parametrize(
    ("reply", "arrived"),
    [
        ({"status": "completed"}, True),
        ({"status": "completed", "ram": {}, "total-time": 5}, False),  # the source, which was continued
        ({"status": "setup", "socket-address": []}, False),
        ({"status": "failed"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_only_a_target_tells_that_a_migration_is_completed_and_not_what_it_sent(reply: object, arrived: bool) -> None:
    assert qapi.parse_has_arrived(reply) is arrived


def test_query_machines_tells_whether_a_machine_hotplugs() -> None:
    reply = [{"name": "q35", "hotpluggable-cpus": True}, {"name": "microvm", "hotpluggable-cpus": False}, 7]
    assert [qapi.parse_hotplugs(reply, name) for name in ("q35", "microvm", "other")] == [True, False, False]
    assert qapi.parse_hotplugs({}, "q35") is False


def test_ospm_status_keeps_cpus_and_passes_over_memory() -> None:
    cpu = {"slot": "3", "slot-type": "CPU", "source": 3, "status": 130}
    assert qapi.parse_ospm_status([cpu, {"slot": "0", "slot-type": "DIMM", "source": 0, "status": 0}]) == {
        3: OstAnswer(3, 130)
    }
    with pytest.raises(MalformedReplyError, match="'slot' is not a slot's number"):
        qapi.parse_ospm_status([{**cpu, "slot": "three"}])


@pytest.mark.parametrize(
    ("read", "good", "value", "bad"),
    [
        (qapi.parse_machine, "pc-q35-10.0-machine", "pc-q35-10.0", "q35,firmware=/etc/shadow-machine"),
        (qapi.parse_arch, {"arch": "x86_64"}, "x86_64", {"arch": "x86_64 --"}),
        (qapi.parse_arch, {"arch": "ppc64"}, "ppc64", {"arch": 64}),
        (
            qapi.parse_uuid,
            {"UUID": "8e9a45f1-0b52-4f1e-9d0c-3a5a7f6b2c11"},
            "8e9a45f1-0b52-4f1e-9d0c-3a5a7f6b2c11",
            {"UUID": "../x"},
        ),
        (qapi.parse_uuid, {"UUID": "00000000-0000-0000-0000-000000000000"}, None, {"UUID": 7}),
    ],
)
def test_a_name_of_the_vm_is_one_that_qemu_gives(read: Any, good: Any, value: str | None, bad: Any) -> None:
    assert read(good) == value
    assert read(None) is None
    with pytest.raises(MalformedReplyError) as caught:
        read(bad)
    assert caught.value.reply == bad


def test_the_topology_of_every_version_is_read() -> None:
    assert qapi.parse_topology({"maxcpus": 8, "cpus": 1, "sockets": 2, "cores": 2, "threads": 2}) == Topology(
        8, sockets=2, cores=2, threads=2
    )
    assert qapi.parse_topology({"sockets": 2}) is None
    assert qapi.parse_topology(None) is None


def test_every_recorded_cpu_event_is_read() -> None:
    seen: set[str] = set()
    for path in WIRES:
        for entry in json.loads(path.read_text())["wire"]:
            message = entry["msg"]
            if entry["dir"] == "<" and message.get("event") in {"ACPI_DEVICE_OST", "DEVICE_DELETED", "RESET", "STOP"}:
                assert qapi.parse_event(message) is not None, message
                seen.add(message["event"])
    assert {"ACPI_DEVICE_OST", "DEVICE_DELETED"} <= seen
    pseries = next(c for c in all_captures() if c.name == "10.0.2-pseries-threads4")
    last = qapi.parse_event(pseries.data["events"][-1])
    assert last == qapi.Deleted("/machine/peripheral/plug0")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": "vcpu8", "path": "/machine/peripheral/vcpu8"}},
            qapi.GuestError("/machine/peripheral/vcpu8"),
        ),
        ({"event": "RESET", "data": {"guest": False, "reason": "host-qmp-system-reset"}}, qapi.RunEvent.RESET),
        ({"event": "STOP"}, qapi.RunEvent.STOP),
        ({"event": "RESUME"}, qapi.RunEvent.RESUME),
        ({"event": "MIGRATION", "data": {"status": "active"}}, qapi.MigrationStatus("active")),
        ({"event": "NIC_RX_FILTER_CHANGED", "data": {}}, None),
        ({"event": "DEVICE_DELETED", "data": {"path": 3}}, None),
        ({"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {}}, None),
        ({"event": "ACPI_DEVICE_OST", "data": {"info": 7}}, None),
        ({"event": "ACPI_DEVICE_OST", "data": {"info": {"slot-type": "DIMM", "slot": "0"}}}, None),
        (
            {
                "event": "ACPI_DEVICE_OST",
                "data": {"info": {"slot-type": "CPU", "slot": "٣", "source": 1, "status": 0}},
            },
            None,
        ),
        ({"event": "MIGRATION", "data": {}}, None),
        ({"event": "MIGRATION", "data": {"status": "x\ny"}}, None),
        ({"event": "DEVICE_DELETED", "data": {"path": "/" + "x" * 5000}}, None),
        ({"event": ["RESET"]}, None),
        ({"event": None}, None),
    ],
)
def test_an_event_is_read_or_passed_over(message: dict[str, Any], expected: object) -> None:
    assert qapi.parse_event(message) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.sampled_from(["ACPI_DEVICE_OST", "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MIGRATION"]), json_values)
def test_no_event_whatever_it_holds_breaks_the_reader(name: str, data: Any) -> None:
    assert qapi.parse_event({"event": name, "data": data}) is None
