"""What this host allows for the threads of a process: our own, another user's, and in cgroups and namespaces."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpvcpu.host import facts
from qmpvcpu.host.coresched import why_not_core_scheduling
from qmpvcpu.host.facts import numa_node, read_facts
from qmpvcpu.host.processes import read_stat
from qmpvcpu.model.placement import HIGHEST_PRIORITY, Place
from qmpvcpu.model.vcpumap import VcpuMap

from .conftest import NOBODY, MakeCgroup, run

FACTS = """
import os, sys
from qmpvcpu.host.facts import read_facts
facts = read_facts(int(sys.argv[1]) or os.getpid())
for name in ("unreachable", "forbidden", "highest_priority", "why_not_realtime", "main_cpus"):
    print(name, getattr(facts, name), sep="=")
"""


def told(pid: int, *before: str) -> dict[str, str]:
    """Return what a program of its own reads of a process; 0: of itself."""
    return dict(line.split("=", 1) for line in run(FACTS, pid, before=before).splitlines())


@pytest.fixture
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_what_is_allowed_to_our_own_process() -> None:
    found = read_facts(os.getpid())
    assert found.unreachable == found.forbidden == ""
    assert found.online == VcpuMap.parse(Path("/sys/devices/system/cpu/online").read_text().strip())
    assert found.online <= found.existing
    assert found.main_cpus <= found.allowed <= found.online
    assert found.why_not(Place(found.allowed)) == ""
    assert "this host has no CPU 9999" in found.why_not(Place.on([9999]))


def test_to_ask_what_is_allowed_changes_nothing(sleeping: subprocess.Popen[bytes]) -> None:
    first = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(sleeping.pid, first)
    assert read_facts(sleeping.pid).main_cpus == first
    assert os.sched_getaffinity(sleeping.pid) == first
    assert first <= read_facts(sleeping.pid).allowed == read_facts(os.getpid()).allowed


def test_a_process_that_has_ended_is_unreachable(sleeping: subprocess.Popen[bytes]) -> None:
    assert read_facts(2**22 + 1).unreachable.startswith("QEMU, pid 4194305, has ended, or is hidden from us")
    sleeping.kill()
    os.waitid(os.P_PID, sleeping.pid, os.WEXITED | os.WNOWAIT)
    assert "has ended" in read_facts(sleeping.pid).unreachable


def test_a_process_that_ends_while_it_is_looked_at_is_unreachable(
    sleeping: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = read_stat(sleeping.pid)
    monkeypatch.setattr(facts, "read_stat", lambda _: stat)
    sleeping.kill()
    sleeping.wait()
    assert read_facts(sleeping.pid).unreachable == f"QEMU, pid {sleeping.pid}, has ended"


@pytest.mark.usefixtures("root")
def test_another_user_is_told_whose_it_is() -> None:
    found = told(os.getpid(), *NOBODY)
    why = "we may not move QEMU's threads: run as QEMU's user (uid 0), or with CAP_SYS_NICE"
    assert (found["forbidden"], found["highest_priority"], found["why_not_realtime"]) == (why, "0", why)


def test_its_own_user_may_move_it_but_not_make_it_real_time(nobodys: int) -> None:
    found = told(nobodys, *NOBODY)
    assert (found["forbidden"], found["highest_priority"]) == ("", "0")
    limit = "QEMU's limit is 0 (LimitRTPRIO= of its unit, ulimit -r), and we do not have CAP_SYS_NICE"
    assert found["why_not_realtime"] == limit
    assert told(nobodys)["highest_priority"] == str(HIGHEST_PRIORITY)


def test_the_capability_in_a_user_namespace_moves_threads_but_makes_none_real_time() -> None:
    found = told(0, "unshare", "--map-root-user")
    assert (found["forbidden"], found["highest_priority"]) == ("", "0")
    assert "CAP_SYS_NICE" in found["why_not_realtime"]


@pytest.mark.usefixtures("root")
def test_the_capability_is_enough_without_being_root(nobodys: int) -> None:
    """Nobody's process with the capability, looking at a process of root's."""
    before = ("setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+sys_nice", "--ambient-caps=+sys_nice")
    assert told(os.getpid(), *before)["forbidden"] == ""
    assert told(nobodys, *before)["highest_priority"] == str(HIGHEST_PRIORITY)


@pytest.mark.parametrize(
    ("limits", "highest", "why"),
    [
        ("Max realtime priority     0                    0                    \n", 0, "limit is 0"),
        ("Max realtime priority     20                   99                   \n", 20, "limit is 20"),
        ("Max realtime priority     99                   99                   \n", 99, ""),
        ("Max realtime priority     1000                 1000                 \n", 99, ""),
        ("Max realtime priority     unlimited            unlimited            \n", 99, ""),
        ("", 0, "limit is 0"),
    ],
)
def test_without_the_capability_the_limit_of_qemu_counts(
    limits: str, highest: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "read_status", lambda _: {"CapEff": "000001ffff7fffff"})  # all but this one
    monkeypatch.setattr(facts, "read_text", lambda _: limits)
    found = read_facts(os.getpid())
    assert found.highest_priority == highest
    assert why in found.why_not_realtime
    assert bool(found.why_not_realtime) is bool(why)


def test_a_refusal_that_is_none_of_permission_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert read_facts(os.getpid()).forbidden == "QEMU's threads cannot be moved: Function not implemented"


def test_the_cgroup_of_the_main_thread_tells_what_is_allowed(
    sleeping: subprocess.Popen[bytes], make_cgroup: MakeCgroup
) -> None:
    cgroup = make_cgroup("cpuset")
    everywhere = VcpuMap(os.sched_getaffinity(0))
    first = VcpuMap([everywhere.lowest])
    (cgroup / "cpuset.cpus").write_text(str(first))
    (cgroup / "tasks").write_text(str(sleeping.pid))
    found = read_facts(sleeping.pid)
    assert found.allowed == found.main_cpus == first
    assert found.cgroup.endswith(f"/{cgroup.name}")
    if outside := everywhere - first:
        assert f"the cgroup of QEMU ({found.cgroup}) does not allow" in found.why_not(Place(outside))


def test_a_cgroup_without_time_for_real_time_threads_allows_none(
    sleeping: subprocess.Popen[bytes], make_cgroup: MakeCgroup
) -> None:
    cgroup = make_cgroup("cpu")
    if not (cgroup / "cpu.rt_runtime_us").exists():
        return
    (cgroup / "tasks").write_text(str(sleeping.pid))
    found = read_facts(sleeping.pid)
    assert found.highest_priority == 0
    assert "its cpu.rt_runtime_us is 0" in found.why_not(Place.on(found.allowed, "fifo:1"))


def test_core_scheduling_is_asked_for_where_it_is_wanted() -> None:
    assert read_facts(os.getpid()).why_not_core_scheduling == ""
    assert read_facts(os.getpid(), core_scheduling=True).why_not_core_scheduling == why_not_core_scheduling()


def test_the_numa_node_of_a_host_cpu() -> None:
    for node in Path("/sys/devices/system/node").glob("node[0-9]*"):
        for cpu in VcpuMap.parse((node / "cpulist").read_text().strip()):
            assert numa_node(cpu) == int(node.name.removeprefix("node"))
    assert numa_node(9999) is None
