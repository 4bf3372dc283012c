"""Take a running VM over from libvirt, give it exactly the vCPUs that are wished for, and hand it back.

libvirt plugs and unplugs one named vCPU at a time, and hears no refusal of an x86 guest. Its monitor socket is free
while libvirtd is stopped, and QEMU runs on without it. No other VM of this host can be managed meanwhile: seconds, if
the guest complies. What to heed is in docs/libvirt.md.

    sudo python from_libvirt.py VM 0-1,4,6
"""

import asyncio
import subprocess
import sys
from pathlib import Path

import qmpvcpu
from qmpvcpu import OnFailure


class Libvirt:
    """libvirt on this host, as Debian installs it; with modular daemons it is virtqemud."""

    directory = Path("/var/lib/libvirt/qemu")

    def virsh(self, *words: str) -> str:
        """Run virsh and return what it prints."""
        return subprocess.run(["virsh", "--quiet", *words], check=True, stdout=subprocess.PIPE, text=True).stdout

    def stop(self) -> None:
        """Stop it, with the sockets that would start it again."""
        subprocess.run(["systemctl", "stop", "libvirtd*.socket", "libvirtd.service"], check=True)

    def start(self) -> None:
        """Start it again: it finds the VM running, and reads its vCPUs from QEMU."""
        subprocess.run(["systemctl", "start", "libvirtd.socket", "libvirtd.service"], check=True)


async def change(monitor: Path, document: Path, wish: str) -> None:
    """Do what libvirt cannot; the document follows the VM, and only its vCPUs' lines change."""
    async with qmpvcpu.attach(monitor, record=document, base=document) as vm:
        print(await vm.set_map(wish, on_failure=OnFailure.REVERT, timeout=30))
        # A removal that is still pending would be libvirt's to see, which does not see it.
        await vm.wait_settled(timeout=60)


def main(libvirt: Libvirt, name: str, wish: str) -> None:
    """Take over, change, hand back; libvirt is started again in any case."""
    text = libvirt.virsh("dumpxml", "--inactive", "--security-info", name)
    document = Path(f"{name}.xml")
    document.touch(mode=0o600)  # it may hold passwords
    document.write_text(text)
    number = libvirt.virsh("domid", name).strip()
    (monitor,) = libvirt.directory.glob(f"domain-{number}-*/monitor.sock")
    libvirt.stop()
    try:
        asyncio.run(change(monitor, document, wish))
    finally:
        libvirt.start()
    libvirt.virsh("define", str(document))  # its next start has the same vCPUs, in the same order


if __name__ == "__main__":
    if len(sys.argv) != len(["from_libvirt.py", "VM", "MAP"]):
        sys.exit(__doc__)
    try:
        main(Libvirt(), *sys.argv[1:])
    except (qmpvcpu.QmpVcpuError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
