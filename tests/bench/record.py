"""What it costs that a record outlives a crash."""

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import qmpvcpu
from qmpvcpu.record.file import save
from qmpvcpu.testing import MicroGuest
from tests.bench.raw import Raw, raw_client
from tests.bench.row import OURS, RAW, RECORDED, Row, Samples
from tests.bench.setting import Setting, timed

__all__ = ["measure"]

SLOTS = 8
SAVE, BARE, FSYNC = "save", "write and rename, no fsync", "fsync of file and folder"
PLUG = "as `plug one`; recorded: raw and two saves, the intent before the command and the outcome after"
WRITE = (
    "a record of that size written durably (temporary file, fsync, rename, fsync of the folder), and its parts alone"
)


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Measure a recorded plug, and a save by itself."""
    qemu = setting.qemus[setting.newest]
    samples = Samples()
    path = setting.folder / "plug.xml"
    async with (
        MicroGuest(qemu, accel=setting.accel, max_vcpus=SLOTS) as one,  # type: ignore[arg-type]  # a literal
        MicroGuest(qemu, accel=setting.accel, max_vcpus=SLOTS) as two,  # type: ignore[arg-type]  # a literal
        MicroGuest(qemu, accel=setting.accel, max_vcpus=SLOTS) as three,  # type: ignore[arg-type]  # a literal
        qmpvcpu.attach(two.qmp) as plain,
        qmpvcpu.attach(three.qmp, record=path) as recorded,
        raw_client(one.qmp) as client,
    ):
        with client.listener("DEVICE_DELETED" if setting.kvm else "ACPI_DEVICE_OST") as listener:
            raw = Raw(client, plain.layout.slots[1:], listener, tcg=not setting.kvm)
            for _ in range(2 * setting.rounds if setting.kvm else 1):
                for vcpu in range(1, SLOTS):
                    samples.note("plug", RAW, await timed(raw.plug(vcpu)))
                    samples.note("plug", OURS, await timed(plain.plug(vcpu)))
                    samples.note("plug", RECORDED, await timed(recorded.plug(vcpu)))
                for vcpu in range(1, SLOTS):
                    await raw.unplug(vcpu)
                    await plain.unplug(vcpu)
                    await recorded.unplug(vcpu)
    yield Row("plug one, recorded", setting.named(setting.newest, SLOTS), PLUG, samples["plug"])
    data = path.read_bytes()
    for _ in range(7 * setting.rounds):
        samples.note("save", SAVE, await timed(save(setting.folder / "save.xml", data)))
        written, synced = _parts(setting.folder / "parts.xml", data)
        samples.note("save", BARE, written)
        samples.note("save", FSYNC, synced)
    yield Row("one durable save", f"{len(data)} bytes, {_file_system(setting.folder)}", WRITE, samples["save"])


def _parts(path: Path, data: bytes) -> tuple[float, float]:
    """Milliseconds to write and rename, and to fsync file and folder."""
    beside = path.with_suffix(".tmp")
    start = time.perf_counter()
    folder = os.open(path.parent, os.O_RDONLY)
    with beside.open("wb", buffering=0) as file:
        file.write(data)
        before = time.perf_counter()
        os.fsync(file)
        synced = time.perf_counter() - before
    beside.replace(path)
    before = time.perf_counter()
    os.fsync(folder)
    synced += time.perf_counter() - before
    os.close(folder)
    return (time.perf_counter() - start - synced) * 1000, synced * 1000


def _file_system(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(at), kind) for _, at, kind, *_ in mounts if folder.is_relative_to(at)]
    return max(inside)[1] if inside else "unknown file system"
