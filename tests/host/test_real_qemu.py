"""The threads of a real QEMU in a PID namespace of its own, as in a container: found, moved and measured."""

import os
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.errors import ThreadGoneError
from qmpvcpu.host.facts import read_facts
from qmpvcpu.host.threads import HostThread, all_of, find, find_main, is_there, put, read_place, read_usage
from qmpvcpu.model.placement import Place
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.testing import QemuProcess, best_qemu
from tests.waiting import until

pytestmark = pytest.mark.qemu

MACHINE = ("-machine", "q35", "-accel", "tcg", "-smp", "2,maxcpus=4", "-cpu", "qemu64")


def allowed(thread: HostThread) -> str:
    """Return the host CPUs of a thread, as the kernel lists them."""
    lines = Path(thread.directory, "status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:"))


async def test_the_threads_of_a_contained_qemu_are_put_in_their_place(tmp_path: Path) -> None:
    root = "" if os.geteuid() == 0 else "--map-root-user"
    wrapper = tmp_path / "qemu"
    wrapper.write_text(f'#!/bin/sh\nexec unshare {root} --pid --fork --kill-child {best_qemu()} "$@"\n')
    wrapper.chmod(0o755)
    async with QemuProcess(wrapper, MACHINE) as qemu:
        await qemu.wait_ready()
        monitor = await Monitor.open(qemu.qmp, timeout=5, on_event=lambda _: None, on_lost=lambda _: None)

        async def tids() -> list[int]:
            cpus: list[dict[str, Any]] = await monitor.execute("query-cpus-fast")
            return [cpu["thread-id"] for cpu in cpus]

        first = await tids()
        assert max(first) < 100  # its own numbers
        pid = monitor.find_qemu(first).pid
        assert pid is not None
        assert pid != qemu.pid  # that is unshare
        main = find_main(pid)
        assert main is not None
        facts = read_facts(pid)
        assert facts.unreachable == facts.forbidden == ""

        lowest = VcpuMap([facts.allowed.lowest])
        put(main, Place(lowest), everywhere=facts.allowed)
        born = {"driver": "qemu64-x86_64-cpu", "id": "vcpu3", "socket-id": 3, "core-id": 0, "thread-id": 0}
        slots: list[dict[str, Any]] = await monitor.execute("query-hotpluggable-cpus")
        await monitor.execute("device_add", {**born, **slots[0]["props"]})
        put(main, Place(facts.main_cpus), everywhere=facts.allowed)
        (new,) = {*await tids()} - {*first}
        threads = find(pid, [*first, new])
        assert allowed(threads[new]) == str(lowest)  # born there
        assert allowed(main) == str(facts.main_cpus)
        assert read_place(threads[new]) == Place.on(lowest, "other")
        usage = read_usage(threads[new])
        assert usage is not None
        assert usage.host_cpu in lowest

        for thread in threads.values():
            assert put(thread, Place.on(lowest, "batch"), everywhere=facts.allowed) == Place.on(lowest, "batch")
            assert allowed(thread) == str(lowest)
        assert {thread.tid for thread in threads.values()} < {thread.tid for thread in all_of(pid)}
        await monitor.close()
    # unshare has ended, and takes it along, one thread after the other
    await until(lambda: read_facts(pid).unreachable and not is_there(threads[new]))
    with pytest.raises(ThreadGoneError):
        put(threads[new], Place(lowest), everywhere=lowest)
    assert read_usage(threads[new]) is None
