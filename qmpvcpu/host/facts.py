"""What this host allows for the threads of one QEMU: its CPUs, the cgroup's cpuset, permissions.

Source: the kernel's admin-guide/cputopology.rst, admin-guide/cgroup-v1/cpusets.rst, admin-guide/cgroup-v2.rst
("Cpuset") and scheduler/sched-rt-group.rst; cgroups(7); sched(7), "Privileges and resource limits".
"""

import errno
import os
from typing import Final, NamedTuple

from qmpvcpu.errors import InvalidMapError
from qmpvcpu.host.coresched import why_not_core_scheduling
from qmpvcpu.host.processes import read_text
from qmpvcpu.model.placement import HIGHEST_PRIORITY, HostFacts
from qmpvcpu.model.vcpumap import VcpuMap

_CPUS: Final = "/sys/devices/system/cpu"
_CGROUPS: Final = "/sys/fs/cgroup"
# Where the cgroups are, and the file in each. The second: v1 before Linux 3.17, v2 where v1 is in use too.
_V1: Final = (
    (f"{_CGROUPS}/cpuset", "cpuset.effective_cpus"),
    (f"{_CGROUPS}/cpuset", "cpuset.cpus"),
)
_V2: Final = (
    (_CGROUPS, "cpuset.cpus.effective"),
    (f"{_CGROUPS}/unified", "cpuset.cpus.effective"),
)
_CAP_SYS_NICE: Final = 23  # include/uapi/linux/capability.h
_FIRST_USER_NAMESPACE: Final = 0xEFFFFFFD  # PROC_USER_INIT_INO in include/linux/proc_ns.h


class Cpuset(NamedTuple):
    """What a cgroup allows the threads in it.

    Attributes:
        cpus: The host CPUs; empty: nothing tells.
        cgroup: The cgroup's name, such as ``/machine.slice``.
    """

    cpus: VcpuMap
    cgroup: str


def read_facts(pid: int, *, core_scheduling: bool = False) -> HostFacts:
    """Return what this host allows for the threads of QEMU, process *pid*, as it is now.

    Args:
        pid: QEMU, as ``find_qemu`` found it.
        core_scheduling: True also asks whether the kernel has core scheduling, which costs 3 ms once.
    """
    online = _cpus(f"{_CPUS}/online")
    cpuset = read_cpuset(f"/proc/{pid}")
    try:
        main_cpus = VcpuMap(os.sched_getaffinity(pid))
    except OSError:
        return HostFacts(unreachable=f"QEMU, process {pid}, has ended")
    forbidden = _why_forbidden(pid)
    highest, why_not_realtime = _highest_priority(pid, forbidden)
    return HostFacts(
        forbidden=forbidden,
        existing=_cpus(f"{_CPUS}/present") or online,
        online=online,
        allowed=cpuset.cpus or online,
        cgroup=cpuset.cgroup,
        main_cpus=main_cpus,
        highest_priority=highest,
        why_not_realtime=why_not_realtime,
        why_not_core_scheduling=why_not_core_scheduling() if core_scheduling else "",
    )


def read_cpuset(directory: str) -> Cpuset:
    """Return what the cgroup of a process or thread allows it, and any thread that is born there.

    The affinity of a thread does not tell it: it may be narrower.

    Args:
        directory: That of the process or thread, such as ``/proc/7`` or ``/proc/7/task/8``.
    """
    groups = dict(_cgroups(directory))
    group = groups.get("cpuset", groups.get("", "/"))
    files = _V1 if "cpuset" in groups else _V2
    # Without the controller a cgroup has its parent's cpuset. One that is outside of our own cgroup namespace, as in
    # /.., or of what is mounted here, has at most what we see at the top.
    path = group
    while True:
        for root, name in files:
            if cpus := _cpus(f"{root}{path.rstrip('/')}/{name}"):
                return Cpuset(cpus, group)
        if path in ("", "/"):
            return Cpuset(VcpuMap(), group)
        path = path.rpartition("/")[0]


def numa_node(cpu: int) -> int | None:
    """Return the NUMA node of a host CPU, None where the kernel tells none."""
    try:
        names = os.listdir(f"{_CPUS}/cpu{cpu}")  # noqa: PTH208 - pathlib brings urllib
    except OSError:
        return None
    nodes = (name.removeprefix("node") for name in names if name.startswith("node"))
    return next((int(node) for node in nodes if node.isdecimal()), None)


def _cpus(path: str) -> VcpuMap:
    try:
        return VcpuMap.parse(read_text(path).strip())
    except InvalidMapError:
        return VcpuMap()


def _cgroups(directory: str) -> list[tuple[str, str]]:
    """Return the cgroup of a thread in each hierarchy, by controller; by "" that of cgroup v2."""
    lines = (line.split(":", 2) for line in read_text(f"{directory}/cgroup").splitlines())
    return [(controller, path) for _, controllers, path in lines for controller in controllers.split(",")]


def _why_forbidden(pid: int) -> str:
    """Return why we may not move the threads of process *pid*, or "".

    The kernel says so itself: it looks at the permission first, and then refuses a thread that is to run nowhere.
    """
    try:
        os.sched_setaffinity(pid, ())
    except PermissionError:
        who = _status(pid).get("Uid", "").split()[:1]
        other = f" (uid {who[0]})" if who else ""
        return f"we may not move QEMU's threads: run as QEMU's user{other}, or with CAP_SYS_NICE"
    except OSError as error:
        if error.errno == errno.EINVAL:
            return ""
        return f"QEMU's threads cannot be moved: {error.strerror}"
    return ""


def _highest_priority(pid: int, forbidden: str) -> tuple[int, str]:
    """Return the highest real-time priority that threads of *pid* may have, and why it is not 99, or "".

    The capability counts in the first user namespace alone, and the limit is that of the thread's process.

    Source: ``__sched_setscheduler()`` and ``user_check_sched_setscheduler()`` in kernel/sched/syscalls.c.
    """
    if forbidden:
        return 0, forbidden
    groups = dict(_cgroups(f"/proc/{pid}"))
    if "cpu" in groups:
        path = groups["cpu"]
        if read_text(f"{_CGROUPS}/cpu{path.rstrip('/')}/cpu.rt_runtime_us").strip() == "0":
            return 0, f"the cgroup of QEMU ({path}) has no real-time run time (cpu.rt_runtime_us is 0)"
    if _is_privileged():
        return HIGHEST_PRIORITY, ""
    limit = min(_realtime_limit(pid), HIGHEST_PRIORITY)
    if limit == HIGHEST_PRIORITY:
        return limit, ""
    return limit, f"QEMU's limit is {limit} (LimitRTPRIO= of its unit, ulimit -r), and we do not have CAP_SYS_NICE"


def _is_privileged() -> bool:
    held = int(_status("self").get("CapEff", "0"), 16)
    try:
        first = os.stat("/proc/self/ns/user").st_ino == _FIRST_USER_NAMESPACE  # noqa: PTH116 - pathlib brings urllib
    except OSError:
        first = True  # a kernel without user namespaces
    return first and bool(held >> _CAP_SYS_NICE & 1)


def _realtime_limit(pid: int) -> int:
    for line in read_text(f"/proc/{pid}/limits").splitlines():
        if line.startswith("Max realtime priority"):
            soft = line.split()[3]
            return HIGHEST_PRIORITY if soft == "unlimited" else int(soft)
    return 0


def _status(process: int | str) -> dict[str, str]:
    lines = read_text(f"/proc/{process}/status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
