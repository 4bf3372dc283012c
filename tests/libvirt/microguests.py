"""Domains that libvirt runs: the micro-guest in them, and a QMP socket beside libvirt's own."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpvcpu.testing import Behaviour, rom_image
from tests.libvirt.daemon import Libvirt

__all__ = ["Domain", "MonitorLog", "Shape", "microguest_domain", "start", "vcpu_side"]

DOCUMENT = """<domain type='{type}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>16</memory>
  <vcpu placement='static' current='{boot}'>{vcpus}</vcpu>
{rows}  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader type='rom'>{rom}</loader>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu{mode}>{topology}{cells}{features}</cpu>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{qmp},server=on,wait=off'/>
    <qemu:arg value='-debugcon'/>
    <qemu:arg value='file:{words}'/>
  </qemu:commandline>
</domain>
"""
READY_WITHIN_S = 10.0
SENT = re.compile(rb"QEMU_MONITOR_SEND_MSG: mon=\S+ msg=(\{.*\})")


@dataclass(frozen=True)
class Shape:
    """What a domain's vCPUs are.

    Attributes:
        vcpus: How many there can be.
        boot: How many QEMU starts with.
        topology: ``<topology>``'s attributes; "" for none.
        cells: vCPUs of each NUMA cell; empty for none.
        plugged: Those plugged before the guest runs, in this order; the document has ``<vcpus>`` then.
        behaviour: How its guest answers.
    """

    vcpus: int = 8
    boot: int = 1
    topology: str = ""
    cells: tuple[str, ...] = ()
    plugged: tuple[int, ...] = ()
    behaviour: tuple[Behaviour, ...] = ()

    @property
    def rows(self) -> str:
        """``<vcpus>``, where there is one."""
        if not self.plugged:
            return ""
        created = [*range(self.boot), *self.plugged]
        rows = []
        for number in range(self.vcpus):
            hotpluggable = "no" if number < self.boot else "yes"
            order = f" order='{created.index(number) + 1}'" if number in created else ""
            enabled = "yes" if order else "no"
            rows.append(f"    <vcpu id='{number}' enabled='{enabled}' hotpluggable='{hotpluggable}'{order}/>\n")
        return f"  <vcpus>\n{''.join(rows)}  </vcpus>\n"


@dataclass(frozen=True)
class Domain:
    """A domain of libvirt's that runs.

    Attributes:
        libvirt: Who runs it.
        name: Its name.
        qmp: A QMP socket of its QEMU that libvirt knows nothing of.
        words: What its guest says, in a file.
    """

    libvirt: Libvirt
    name: str
    qmp: Path
    words: Path

    def virsh(self, command: str, *words: str | Path) -> str:
        """Run a virsh command on it; return what it prints."""
        return self.libvirt.virsh(command, self.name, *words)

    def live(self) -> bytes:
        """Return libvirt's document of it as it runs."""
        return self.virsh("dumpxml").encode()


def microguest_domain(
    libvirt: Libvirt, name: str, qemu: Path, *, accel: str = "kvm", shape: Shape | None = None
) -> tuple[Domain, bytes]:
    """Return a domain that is yet to be defined or created, with its document."""
    shape = shape or Shape()
    rom = libvirt.folder / f"{name}.rom"
    rom.write_bytes(rom_image(shape.behaviour))
    kvm = accel == "kvm"
    # 16 MiB, over all cells: libvirt hands QEMU each cell's memory apart.
    each = 16384 // max(len(shape.cells), 1)
    cells = [f"<cell id='{i}' cpus='{cpus}' memory='{each}' unit='KiB'/>" for i, cpus in enumerate(shape.cells)]
    domain = Domain(libvirt, name, libvirt.folder / f"{name}.qmp", libvirt.folder / f"{name}.words")
    document = DOCUMENT.format(
        type="kvm" if kvm else "qemu",
        name=name,
        boot=shape.boot + len(shape.plugged),
        vcpus=shape.vcpus,
        rows=shape.rows,
        rom=rom,
        mode=" mode='host-passthrough' check='none'" if kvm else "",
        topology=f"<topology {shape.topology}/>" if shape.topology else "",
        cells=f"<numa>{''.join(cells)}</numa>" if cells else "",
        features="<feature policy='disable' name='arch-capabilities'/>" if kvm else "",
        emulator=qemu,
        qmp=domain.qmp,
        words=domain.words,
    )
    return domain, document.encode()


def start(domain: Domain, document: bytes, *, define: bool = False) -> None:
    """Have libvirt run it; return when its guest is ready. *define*: it stays known once it has ended."""
    file = domain.libvirt.folder / f"{domain.name}.xml"
    file.write_bytes(document)
    if define:
        domain.libvirt.virsh("define", "--validate", file)
        domain.virsh("start")
    else:
        domain.libvirt.virsh("create", "--validate", file)
    # Before that QEMU takes no removal.
    deadline = time.monotonic() + READY_WITHIN_S
    while b"R" not in domain.words.read_bytes():
        assert time.monotonic() < deadline, "the guest does not come up"
        time.sleep(0.005)


def vcpu_side(xml: bytes) -> str:
    """Return ``<vcpu>`` and ``<vcpus>`` of a document, as they stand there."""
    text = xml.decode()
    found = re.findall(r"^  <vcpu [^>]*>[^<]*</vcpu>\n", text, re.MULTILINE)
    return "".join(found + re.findall(r"^  <vcpus>.*?</vcpus>\n", text, re.MULTILINE | re.DOTALL))


class MonitorLog:
    """What libvirt has sent to its domains' QEMUs from now on."""

    def __init__(self, libvirt: Libvirt) -> None:
        self._log = libvirt.monitor_log
        self._read = self._log.stat().st_size

    def sent(self) -> list[dict[str, Any]]:
        """Return the commands since the last call, or since it was made."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            news = file.read()
        self._read += len(news)
        return [json.loads(each) for each in SENT.findall(news)]
