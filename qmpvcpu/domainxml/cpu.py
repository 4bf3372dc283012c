"""CPU models: QEMU's names of them and libvirt's.

QMP reports the CPU model, through the type of the slots, but not the features that were requested. A document that is
written from a running VM notes that in an element of our own under ``<metadata>``, for those who start a VM from it::

    <qmpvcpu:cpu xmlns:qmpvcpu="urn:qmpvcpu:cpu:1" model="EPYC" features="unknown"/>

The note counts while ``<cpu>`` says what was written with it. Once somebody names another model, or features, the
document knows better. Without ``model``, QEMU reported none, as for a machine without CPU hotplug.
"""

from collections.abc import Mapping
from typing import Final

from qmpvcpu.domainxml.domain import CpuModel, DomainVcpus
from qmpvcpu.domainxml.writer import Node
from qmpvcpu.errors import shorten
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.names import is_same_model

CPU_MODEL: Final = "cpu-model"
CPU_FEATURES: Final = "cpu-features"
IOMMU: Final = "iommu"

_MOST_QUOTED: Final = 60

_NAMESPACE: Final = "urn:qmpvcpu:cpu:1"
CPU_MARK: Final = f"{{{_NAMESPACE}}}cpu"

_HOST_MODES: Final[Mapping[str, str]] = {"host": "host-passthrough", "max": "maximum"}
_HOST_MODELS: Final = {mode: name for name, mode in _HOST_MODES.items()}
# What QEMU uses without -cpu; libvirt writes it out unless its own default differs.
DEFAULT_MODELS: Final = {"x86_64": "qemu64", "i686": "qemu32", "loongarch64": "la464"}

MODES_WITHOUT_MODEL: Final = ("host-passthrough", "maximum")
MODES: Final = ("custom", "host-model", *MODES_WITHOUT_MODEL)
"""Those of ``<cpu>``."""
SWITCHES: Final = {"force": "on", "require": "on", "optional": "on", "disable": "off", "forbid": "off"}
"""What QEMU is told for each policy of a ``<feature>``."""


def running_model(layout: Layout) -> str | None:
    """Return QEMU's name of the model that a VM runs with, or None where QEMU does not report it."""
    return layout.slots[0].model if layout.slots else None


def model_from(layout: Layout) -> CpuModel | None:
    """Return the model that a VM runs with in libvirt's terms, or None where QEMU does not report it."""
    name = running_model(layout)
    return None if name is None else model_named(name)


def model_named(name: str) -> CpuModel:
    """Return QEMU's model *name* in libvirt's terms."""
    mode = _HOST_MODES.get(name)
    if mode is None:
        return CpuModel("custom", name)
    return CpuModel(mode, migratable="on" if mode == "host-passthrough" else None)


def cpu_parts(model: CpuModel) -> tuple[Mapping[str, str], tuple[Node, ...]]:
    """Return the attributes and the children of the ``<cpu>`` that names *model*.

    They ask libvirt for exactly this model, without checking it against the host: QEMU already runs it.
    """
    if model.mode == "custom":
        said = {"mode": "custom", "match": "exact", "check": "none"}
        return said, (Node("model", {"fallback": "forbid"}, model.model or ""),)
    migratable = {} if model.migratable is None else {"migratable": model.migratable}
    return {"mode": model.mode, "check": "none", **migratable}, ()


def mark_node(layout: Layout) -> Node:
    """Return the note on the CPU that goes under ``<metadata>`` of a document written from *layout*."""
    name = running_model(layout)
    told = {} if name is None else {"model": name}
    return Node("qmpvcpu:cpu", {"xmlns:qmpvcpu": _NAMESPACE, **told, "features": "unknown"})


def qemu_model(domain: DomainVcpus) -> str | None:
    """Return QEMU's name of the model that a document asks for; None where QEMU or the host chooses."""
    model = domain.cpu or CpuModel("custom")
    if model.mode != "custom":
        return _HOST_MODELS.get(model.mode)
    if model.model is None:
        # Under KVM libvirt's default for s390x is host-model.
        target = domain.target or ""
        return "qemu" if target == "s390x" and domain.type == "qemu" else DEFAULT_MODELS.get(target)
    return model.model


def needs_kvm(model: CpuModel | None) -> bool:
    """Return True if a model is the host's own CPU, which TCG does not have."""
    return model is not None and model.mode == "host-passthrough"


def cpu_differs(layout: Layout, domain: DomainVcpus) -> str | None:
    """Return how the running CPU model differs from the document's; None if it does not, or is not known."""
    running = running_model(layout)
    named = qemu_model(domain)
    if running is None or named is None or is_same_model(named, running):
        return None
    said = f"names the CPU model {shorten(named, _MOST_QUOTED)}" if domain.cpu else f"names no CPU model ({named})"
    return f"the document {said}, and QEMU runs {running}: a VM that is started from it has another CPU"
