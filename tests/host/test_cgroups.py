"""What cgroups allow: as they are here, and as they are elsewhere, in a tree that is mounted instead."""

import json
import os
from pathlib import Path

import pytest

from qmpvcpu.host.cgroups import is_frozen, read_cpuset, why_no_realtime
from qmpvcpu.model.vcpumap import VcpuMap

from .conftest import MakeCgroup, Sleeper, run

# In a mount namespace of its own: the tree, then what is mounted of it where the kernel has its cgroups, then ours.
LOOK = """
import json, os, pathlib, subprocess, sys
from qmpvcpu.host.cgroups import is_frozen, read_cpuset, why_no_realtime
files, mounts, cgroup = map(json.loads, sys.argv[1:])
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
mount("-t", "tmpfs", "tree", "/mnt")
for name, text in files.items():
    path = pathlib.Path("/mnt") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
mount("-t", "tmpfs", "cgroup", "/sys/fs/cgroup")
for source, target in mounts:
    pathlib.Path("/sys/fs/cgroup", target).mkdir(parents=True, exist_ok=True)
    mount("--bind", f"/mnt/{source}", f"/sys/fs/cgroup/{target}")
pathlib.Path("/mnt/ours").write_text(cgroup)
mount("--bind", "/mnt/ours", f"/proc/{os.getpid()}/cgroup")
cpuset = read_cpuset("/proc/self")
print(json.dumps([str(cpuset.cpus), cpuset.cgroup, why_no_realtime("/proc/self"), is_frozen(os.getpid())]))
"""
V2 = {"cgroup.procs": "", "cpuset.cpus.effective": "0-7\n", "cgroup.controllers": "cpu\n"}
V1 = {"cpuset/tasks": "", "cpuset/cpuset.effective_cpus": "0-7\n"}
ALL = [["", ""]]


def look(files: dict[str, str], cgroup: str, mounts: list[list[str]] = ALL) -> tuple[str, str, str, bool]:
    """Return a cgroup's CPUs and name, why it has no time for real-time threads, and whether it is frozen."""
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    arguments = map(json.dumps, (files, mounts, cgroup))
    cpus, name, why, frozen = json.loads(run(LOOK, *arguments, before=("unshare", *user, "--mount")))
    return cpus, name, why, frozen


@pytest.mark.parametrize(
    ("more", "cgroup", "cpus", "name"),
    [
        ({}, "0::/\n", "0-7", "/"),
        ({"a/b/cpuset.cpus.effective": "2-3\n"}, "0::/a/b\n", "2-3", "/a/b"),
        # without the controller, and threaded: the parent's
        ({"a/b/cpuset.cpus.effective": "2-3\n", "a/b/emulator/x": ""}, "0::/a/b/emulator\n", "2-3", "/a/b/emulator"),
        ({"a/b/cgroup.procs": ""}, "0::/a/b\n", "0-7", "/a/b"),
        ({"a/cpuset.cpus.effective": "\n", "a/cgroup.procs": ""}, "0::/a\n", "0-7", "/a"),
        ({}, "0::/gone (deleted)\n", "0-7", "/gone (deleted)"),
        ({"a:b/cpuset.cpus.effective": "5\n"}, "0::/a:b\n", "5", "/a:b"),
        ({}, "0::/../other\n", "", "/../other"),  # outside of our cgroup namespace
        ({"a/cpuset.cpus.effective": "nonsense\n", "cpuset.cpus.effective": "\n"}, "0::/a\n", "", "/a"),
        ({}, "", "", ""),
        ({}, "nonsense\n", "", ""),
    ],
)
def test_the_cpus_of_a_cgroup_of_version_2(more: dict[str, str], cgroup: str, cpus: str, name: str) -> None:
    assert look(V2 | more, cgroup)[:2] == (cpus, name)


def test_the_cpus_of_a_cgroup_of_version_1() -> None:
    own = {"cpuset/a/cpuset.effective_cpus": "4-5\n", "cpuset/a/cpuset.cpus": "4-6\n"}
    assert look(V1 | own, "3:cpuset:/a\n0::/\n")[:2] == ("4-5", "/a")
    assert look(V1, "3:cpuset:/\n0::/x\n")[:2] == ("0-7", "/")
    before_3_17 = {"cpuset/tasks": "", "cpuset/a/cpuset.cpus": "4-6\n"}
    assert look(before_3_17, "3:cpuset:/a\n")[:2] == ("4-6", "/a")


def test_version_2_beside_version_1() -> None:
    both = {"unified/cgroup.procs": "", "unified/a/cpuset.cpus.effective": "1\n", "cpu/tasks": ""}
    assert look(both, "2:cpu,cpuacct:/b\n1:name=systemd:/c\n0::/a\n")[:2] == ("1", "/a")


def test_in_a_container_only_its_part_is_mounted() -> None:
    files = {"docker/abc/cpuset.effective_cpus": "0-3\n", "docker/abc/vm/cpuset.effective_cpus": "2\n"}
    mounts = [["docker/abc", "cpuset"]]
    assert look(files, "3:cpuset:/docker/abc/vm\n", mounts)[:2] == ("2", "/docker/abc/vm")
    assert look(files, "3:cpuset:/docker/abc\n", mounts)[:2] == ("0-3", "/docker/abc")
    assert look(files, "3:cpuset:/docker/abcd\n", mounts)[:2] == ("", "/docker/abcd")  # another one
    of_v2 = {f"docker/abc/{name}": text for name, text in V2.items()} | {"docker/abc/vm/cpuset.cpus.effective": "6\n"}
    assert look(of_v2, "0::/docker/abc/vm\n", [["docker/abc", ""]])[:2] == ("6", "/docker/abc/vm")


def test_time_for_real_time_threads_is_known_of_version_1() -> None:
    none = {"cpu/a/cpu.rt_runtime_us": "0\n"}
    assert look(V1 | none, "4:cpu,cpuacct:/a\n3:cpuset:/\n")[2].startswith("the cgroup of QEMU (/a) has no time")
    assert look(V1 | {"cpu/a/cpu.rt_runtime_us": "950000\n"}, "4:cpu:/a\n")[2] == ""
    assert look(V1 | {"cpu/a/tasks": ""}, "4:cpu:/a\n")[2] == ""
    assert look(V1 | none, "4:cpu:/../a\n")[2] == ""
    assert look(V2, "0::/a\n")[2] == ""


def test_a_frozen_cgroup_is_known_of_both_versions() -> None:
    frozen = {"cgroup.events": "populated 1\nfrozen 1\n", "freezer.state": "FROZEN\n"}
    at = {f"{root}a/{name}": text for root in ("", "unified/", "freezer/") for name, text in frozen.items()}
    assert look(V2 | at, "0::/a\n")[3]
    assert not look(V2 | at, "0::/\n")[3]
    assert look(V1 | at, "0::/a\n")[3]
    assert look(V1 | at, "5:freezer:/a\n0::/\n")[3]
    assert not look(V1 | at, "5:freezer:/b\n0::/\n")[3]


def test_what_the_kernel_has_here(make_cgroup: MakeCgroup) -> None:
    cgroup = make_cgroup("cpuset")
    sleeper = Sleeper()
    assert read_cpuset("/proc/self").cpus == VcpuMap.parse((cgroup / "cpuset.effective_cpus").read_text().strip())
    first = VcpuMap([read_cpuset("/proc/self").cpus.lowest])
    (cgroup / "cpuset.cpus").write_text(str(first))
    (cgroup / "tasks").write_text(str(sleeper.tid))
    cpus, name = read_cpuset(f"/proc/self/task/{sleeper.tid}")
    assert cpus == first
    assert name.endswith(cgroup.name)
    sleeper.end()
    assert read_cpuset(f"/proc/self/task/{sleeper.tid}") == (VcpuMap(), "")


def test_a_cgroup_is_never_written(make_cgroup: MakeCgroup) -> None:
    """Not by looking."""
    cgroup = make_cgroup("cpuset")
    before = {path: (path.stat().st_mtime_ns, _text(path)) for path in cgroup.iterdir()}
    read_cpuset("/proc/self")
    why_no_realtime("/proc/self")
    is_frozen(os.getpid())
    assert {path: (path.stat().st_mtime_ns, _text(path)) for path in cgroup.iterdir()} == before


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
