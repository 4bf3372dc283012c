"""What the cgroup of a process allows: version 1, version 2, or both. Nothing here changes a cgroup.

Source: cgroups(7); the kernel's admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/cpusets.rst and
freezer-subsystem.rst, scheduler/sched-rt-group.rst; proc(5), ``/proc/pid/cgroup`` and ``/proc/pid/mountinfo``.
"""

from typing import Final, NamedTuple

from qmpvcpu.errors import InvalidMapError
from qmpvcpu.host.files import names_in, read_text
from qmpvcpu.model.vcpumap import VcpuMap

_MOUNTED: Final = "/sys/fs/cgroup"
_V2: Final = ""  # how /proc/pid/cgroup calls its controllers


class Cpuset(NamedTuple):
    """What a cgroup allows the threads in it.

    Attributes:
        cpus: The host CPUs that are online and allowed; empty: unknown.
        cgroup: The cgroup, such as ``/machine.slice``; "" if there is none.
    """

    cpus: VcpuMap
    cgroup: str


def read_cpuset(process: int | str) -> Cpuset:
    """Return what its cgroup allows a process or thread, and any thread born there.

    A thread's affinity does not tell: it may be narrower.

    Args:
        process: The id of a process or thread on this host, or its directory, such as ``/proc/7/task/8``.
    """
    cgroups = _cgroups(f"/proc/{process}" if isinstance(process, int) else process)
    of_v1 = "cpuset" in cgroups
    cgroup = cgroups.get("cpuset" if of_v1 else _V2, "")
    if not cgroup:
        return Cpuset(VcpuMap(), "")
    names = ("cpuset.effective_cpus", "cpuset.cpus") if of_v1 else ("cpuset.cpus.effective",)  # the 2nd until 3.17
    root = _root("cpuset" if of_v1 else _V2)
    below = _below(root, cgroup)
    while below is not None:
        for name in names:
            if cpus := cpus_in(f"{root}{below}/{name}"):
                return Cpuset(cpus, cgroup)
        below = below.rpartition("/")[0] if below else None  # without the controller it has what its parent has
    return Cpuset(VcpuMap(), cgroup)


def why_no_realtime(directory: str) -> str:
    """Return why the cgroup of a process or thread gives no time to real-time threads, or ""."""
    cgroup = _cgroups(directory).get("cpu")
    if cgroup is None:
        return ""
    root = _root("cpu")
    below = _below(root, cgroup)
    if below is None or read_text(f"{root}{below}/cpu.rt_runtime_us").strip() != "0":
        return ""
    return f"the cgroup of QEMU ({cgroup}) has no time for real-time threads: its cpu.rt_runtime_us is 0"


def is_frozen(pid: int) -> bool:
    """Return True if the cgroup of *pid* is frozen, as a container that was paused."""
    cgroups = _cgroups(f"/proc/{pid}")
    if "freezer" in cgroups:
        state = read_text(f"{_root('freezer')}{cgroups['freezer'].rstrip('/')}/freezer.state").strip()
        if state in ("FREEZING", "FROZEN"):
            return True
    if _V2 not in cgroups:
        return False
    return "frozen 1" in read_text(f"{_root(_V2)}{cgroups[_V2].rstrip('/')}/cgroup.events").splitlines()


def cpus_in(path: str) -> VcpuMap:
    """Return the host CPUs that a file of the kernel lists; none if it is not there, or hidden."""
    try:
        return VcpuMap.parse(read_text(path).strip())
    except InvalidMapError:
        return VcpuMap()


def _cgroups(directory: str) -> dict[str, str]:
    """Return the cgroup of a process or thread in each hierarchy, by controller; by "" that of version 2."""
    lines = (line.split(":", 2) for line in read_text(f"{directory}/cgroup").splitlines())
    named = (fields for fields in lines if len(fields) == 3)  # noqa: PLR2004 - as documented
    return {controller: path for _, controllers, path in named for controller in controllers.split(",")}


def _root(controller: str) -> str:
    """Return where the hierarchy of a controller is mounted, as systemd and all others do it."""
    if controller != _V2:
        return f"{_MOUNTED}/{controller}"
    return _MOUNTED if "cgroup.procs" in names_in(_MOUNTED) else f"{_MOUNTED}/unified"


def _below(root: str, cgroup: str) -> str | None:
    """Return the path of a cgroup below what is mounted at *root*; None if it is not below it.

    In a container only a part may be mounted.
    """
    if cgroup.startswith("/.."):
        return None  # outside of our cgroup namespace
    path = cgroup.rstrip("/")
    if not path or names_in(f"{root}{path}"):
        return path
    mounts = (line.split() for line in read_text("/proc/self/mountinfo").splitlines())
    parts = [fields[3].rstrip("/") for fields in mounts if fields[4] == root]  # the last one hides the others
    if not parts or not f"{path}/".startswith(f"{parts[-1]}/"):
        return None
    return path.removeprefix(parts[-1])
