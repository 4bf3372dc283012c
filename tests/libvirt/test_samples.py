"""libvirt takes what we make of a document of the user's own, and reads the same vCPUs in it as we do."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from qmpvcpu.domainxml import DomainVcpus, Metadata, parse, read_identity, render
from tests.domainxml.documents import SAMPLES, one_plugged, one_unplugged, started_from
from tests.libvirt.daemon import Libvirt
from tests.substrates import qemus

pytestmark = pytest.mark.libvirt

# What libvirt adds or resolves by itself, and is no matter of vCPUs.
NOT_OURS = {"individual", "machine", "emulator", "cpu", "memory_kib", "uuid"}
VERSION, QEMU = next(iter(qemus().items()))
# Its schema is stricter than it is itself: no blank in a number, no comma at the end of a cpuset, no empty uuid.
NOT_IN_SCHEMA = {"blank-lines", "cpuset-forms", "placement-derived"}
X86 = [case for case, xml in SAMPLES.items() if parse(xml).arch == "x86_64"]


def here(xml: bytes) -> bytes:
    """Have a document name a QEMU and machine types that this machine has."""
    xml = xml.replace(b"/usr/bin/qemu-system-x86_64", str(QEMU).encode())
    return re.sub(rb"(pc-(q35|i440fx))-7\.2", rb"\g<1>-" + VERSION.encode(), xml)


def printed_by(libvirt: Libvirt, folder: Path, case: str, xml: bytes) -> bytes:
    """Have *libvirt* define a document; return what it prints of it."""
    file = folder / "domain.xml"
    file.write_bytes(xml)
    libvirt.virsh("define", *([] if case in NOT_IN_SCHEMA else ["--validate"]), file)
    printed = libvirt.inactive(parse(xml).name)
    libvirt.forget_all()
    return printed


def vcpu_side(domain: DomainVcpus) -> dict[str, object]:
    return {field.name: getattr(domain, field.name) for field in fields(domain) if field.name not in NOT_OURS}


@pytest.mark.parametrize("case", X86)
def test_libvirt_defines_a_sample_after_each_change_and_prints_the_same_vcpus(
    libvirt: Libvirt, tmp_path: Path, case: str
) -> None:
    base = here(SAMPLES[case])
    layout = started_from(parse(base))
    for after in (layout, one_plugged(layout), one_unplugged(layout)):
        if after is not None:
            metadata = Metadata(generation=7).with_layout(after)
            document = render(after, base=base, metadata=metadata)
            printed = printed_by(libvirt, tmp_path, case, document)
            assert vcpu_side(parse(printed)) == vcpu_side(parse(document))
            assert read_identity(printed).metadata == metadata


def test_most_samples_are_of_machines_that_libvirt_can_be_asked_about() -> None:
    assert len(X86) >= 40
