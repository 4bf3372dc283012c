"""docs/examples/from_libvirt.py takes a VM over from a real libvirtd, changes it, and hands it back."""

from pathlib import Path

import pytest

import qmpvcpu
from docs.examples import from_libvirt
from tests.libvirt.daemon import Libvirt
from tests.libvirt.microguests import Shape, microguest_domain, start, vcpu_side
from tests.substrates import Substrate, substrates

pytestmark = [pytest.mark.libvirt, pytest.mark.qemu]


class ThisLibvirt(from_libvirt.Libvirt):
    """What the example calls libvirt, with a daemon of the tests' own, which systemd knows nothing of."""

    def __init__(self, daemon: Libvirt) -> None:
        self.directory = daemon.folder / "lib" / "qemu"
        self.virsh = daemon.virsh  # type: ignore[method-assign]  # the same, but for its socket
        self.stop = daemon.stop  # type: ignore[method-assign]
        self.start = daemon.start  # type: ignore[method-assign]


@pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"])[-1:])
def test_the_example_takes_a_vm_over_and_hands_it_back(
    libvirt: Libvirt,
    on: Substrate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shape = Shape(boot=2, topology="sockets='2' dies='1' cores='2' threads='2'", plugged=(5,))
    domain, document = microguest_domain(libvirt, "taken", on.qemu, accel=on.accel, shape=shape)
    start(domain, document, define=True)

    from_libvirt.main(ThisLibvirt(libvirt), domain.name, "0-1,3,6-7")

    assert capsys.readouterr().out.startswith("REACHED: vCPUs 0-1,5 to 0-1,3,6-7")
    assert domain.virsh("domstate").strip() == "running"
    assert vcpu_side(domain.live()) == vcpu_side(libvirt.inactive(domain.name))
    domain.virsh("setvcpu", "4", "--enable", "--live")  # libvirt goes on with it

    with pytest.raises(qmpvcpu.StepDeniedError):
        from_libvirt.main(ThisLibvirt(libvirt), domain.name, "0,3")  # a boot vCPU: libvirtd would lose the VM
    assert domain.virsh("domstate").strip() == "running"
