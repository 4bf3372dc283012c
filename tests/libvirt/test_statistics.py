"""What vCPUs have done is the same in ``virsh domstats --vcpu`` and here, of one and the same QEMU."""

import os
import re

import pytest

import qmpvcpu
from qmpvcpu.model.statistics import VmStatistics
from tests.libvirt.daemon import Libvirt
from tests.libvirt.microguests import Shape, microguest_domain, start
from tests.substrates import Substrate, substrates

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu]

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def of_libvirt(told: str) -> dict[int, dict[str, str]]:
    """What ``domstats`` prints of each vCPU, without the prefix."""
    found: dict[int, dict[str, str]] = {}
    for vcpu, name, value in re.findall(r"vcpu\.(\d+)\.(\S+)=(\S+)", told):
        found.setdefault(int(vcpu), {})[name] = value
    return found


@pytest.mark.parametrize("on", substrates(["q35"]))
async def test_both_tell_the_same_of_each_vcpu(libvirt: Libvirt, on: Substrate) -> None:
    shape = Shape(boot=2, plugged=(5,))
    domain, document = microguest_domain(libvirt, "counted", on.qemu, accel=on.accel, shape=shape)
    start(domain, document)
    async with qmpvcpu.attach(domain.qmp) as vm:
        before = await vm.statistics()
        theirs = of_libvirt(domain.virsh("domstats", "--vcpu"))
        after = await vm.statistics()
    assert [each.id for each in after.vcpus] == [0, 1, 5]
    assert after.why_incomplete == ""
    for vcpu in (0, 1, 5):
        _compare(theirs[vcpu], vcpu, before, after)
    assert ("exits.sum" in theirs[5]) == (on.accel == "kvm")


def _compare(theirs: dict[str, str], vcpu: int, before: VmStatistics, after: VmStatistics) -> None:
    earlier, later = before[vcpu], after[vcpu]
    assert earlier.run_s is not None
    assert later.run_s is not None
    assert earlier.delay_s is not None
    assert later.delay_s is not None
    # libvirt 9 reads the time in clock ticks, of which the kernel counts two kinds.
    assert earlier.run_s - 2 * _TICK_S <= int(theirs["time"]) / 1e9 <= later.run_s + 2 * _TICK_S
    assert earlier.delay_s <= int(theirs["delay"]) / 1e9 <= later.delay_s
    assert int(theirs["wait"]) / 1e9 <= (later.wait_s or 0.0)
    # libvirt names the kind of each counter at the end, and leaves histograms out.
    named = {name.rpartition(".")[0]: value for name, value in theirs.items() if "." in name}
    ours = {name: value for name, value in later.kvm.items() if not isinstance(value, tuple)}
    assert named.keys() == ours.keys()
    for name, value in named.items():
        was, now = earlier.kvm[name], later.kvm[name]
        if not isinstance(now, bool) and not isinstance(was, tuple) and isinstance(now, int):
            assert was <= int(value) <= now
