"""What this host allows for the threads of one QEMU: its CPUs, the cgroup's cpuset, permissions.

Source: the kernel's admin-guide/cputopology.rst; sched(7), "Privileges and resource limits".
"""

import errno
import os
from typing import Final

from qmpvcpu.host.cgroups import cpus_in, read_cpuset, why_no_realtime
from qmpvcpu.host.coresched import why_not_core_scheduling
from qmpvcpu.host.files import names_in, read_link, read_text
from qmpvcpu.host.processes import read_stat, read_status
from qmpvcpu.model.placement import HIGHEST_PRIORITY, HostFacts
from qmpvcpu.model.vcpumap import VcpuMap

_CPUS: Final = "/sys/devices/system/cpu"
_CAP_SYS_NICE: Final = 23  # include/uapi/linux/capability.h
_FIRST_USER_NAMESPACE: Final = 0xEFFFFFFD  # PROC_USER_INIT_INO in include/linux/proc_ns.h


def read_facts(pid: int, *, core_scheduling: bool = False) -> HostFacts:
    """Return what this host allows for the threads of QEMU, process *pid*, as it is now.

    Args:
        pid: QEMU, as ``find_qemu`` found it.
        core_scheduling: True also checks whether the kernel has core scheduling, which costs 3 ms once.
    """
    stat = read_stat(pid)
    if stat is None or stat.has_ended or stat.is_ending:
        return HostFacts(unreachable=f"QEMU, pid {pid}, has ended, or is hidden from us (/proc with hidepid)")
    try:
        main_cpus = VcpuMap(os.sched_getaffinity(pid))
    except ProcessLookupError:
        return HostFacts(unreachable=f"QEMU, pid {pid}, has ended")
    online = cpus_in(f"{_CPUS}/online")
    cpuset = read_cpuset(f"/proc/{pid}")
    forbidden = _why_forbidden(pid)
    highest, why_not_realtime = _highest_priority(pid, forbidden)
    return HostFacts(
        forbidden=forbidden,
        existing=cpus_in(f"{_CPUS}/present") or online,
        online=online,
        allowed=cpuset.cpus or online,
        cgroup=cpuset.cgroup,
        main_cpus=main_cpus,
        highest_priority=highest,
        why_not_realtime=why_not_realtime,
        why_not_core_scheduling=why_not_core_scheduling() if core_scheduling else "",
    )


def numa_node(cpu: int) -> int | None:
    """Return the NUMA node of a host CPU, None if the kernel names none."""
    names = names_in(f"{_CPUS}/cpu{cpu}")
    nodes = (name.removeprefix("node") for name in names if name.startswith("node"))
    return next((int(node) for node in nodes if node.isdecimal()), None)


def _why_forbidden(pid: int) -> str:
    """Return why we may not move the threads of process *pid*, or "".

    The kernel says so itself: it checks the permission first, and only then refuses an empty set of host CPUs.
    """
    try:
        os.sched_setaffinity(pid, ())
    except PermissionError:
        who = read_status(f"/proc/{pid}").get("Uid", "").split()[:1]
        other = f" (uid {who[0]})" if who else ""
        return f"we may not move QEMU's threads: run as QEMU's user{other}, or with CAP_SYS_NICE"
    except OSError as error:
        if error.errno == errno.EINVAL:
            return ""
        return f"QEMU's threads cannot be moved: {error.strerror}"
    return ""


def _highest_priority(pid: int, forbidden: str) -> tuple[int, str]:
    """Return the highest real-time priority that threads of *pid* may have, and why it is not 99, or "".

    The capability counts only in the first user namespace, and the limit is that of the thread's process.

    Source: ``__sched_setscheduler()`` and ``user_check_sched_setscheduler()`` in kernel/sched/syscalls.c.
    """
    if forbidden:
        return 0, forbidden
    if why := why_no_realtime(f"/proc/{pid}"):
        return 0, why
    if _is_privileged():
        return HIGHEST_PRIORITY, ""
    limit = min(_realtime_limit(pid), HIGHEST_PRIORITY)
    if limit == HIGHEST_PRIORITY:
        return limit, ""
    return limit, f"QEMU's limit is {limit} (LimitRTPRIO= of its unit, ulimit -r), and we do not have CAP_SYS_NICE"


def _is_privileged() -> bool:
    held = int(read_status("/proc/self").get("CapEff", "0"), 16)
    namespace = read_link("/proc/self/ns/user")  # none: a kernel without user namespaces
    return namespace in ("", f"user:[{_FIRST_USER_NAMESPACE}]") and bool(held >> _CAP_SYS_NICE & 1)


def _realtime_limit(pid: int) -> int:
    for line in read_text(f"/proc/{pid}/limits").splitlines():
        if line.startswith("Max realtime priority"):
            soft = line.split()[3]
            return HIGHEST_PRIORITY if soft == "unlimited" else int(soft)
    return 0
