"""The CPU model: as QEMU tells it of a running VM, as libvirt's ``<cpu>``, and as a document names it.

QMP tells the model, by the slots' type, and not which features were asked for besides. A document written from that
says so in an element of its own under ``<metadata>``, to be told to anybody who starts a VM from it::

    <qmpvcpu:cpu xmlns:qmpvcpu="urn:qmpvcpu:cpu:1" model="EPYC" features="unknown"/>

It counts for as long as ``<cpu>`` says what was written with it: once somebody names another model, or features,
the document knows better. Without ``model`` QEMU told none, as of a machine without CPU hotplug.
"""

from collections.abc import Mapping
from typing import Final

from lxml import etree

from qmpvcpu.domainxml.domain import CpuModel, DomainVcpus
from qmpvcpu.domainxml.nodes import Node
from qmpvcpu.errors import shorten
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.shapes import is_same_model

CPU_MODEL: Final = "cpu-model"
CPU_FEATURES: Final = "cpu-features"
IOMMU: Final = "iommu"

_MOST_QUOTED: Final = 60

_NAMESPACE: Final = "urn:qmpvcpu:cpu:1"
CPU_MARK: Final = f"{{{_NAMESPACE}}}cpu"

_MODES: Final[Mapping[str, str]] = {"host": "host-passthrough", "max": "maximum"}
_MODELS: Final = {mode: name for name, mode in _MODES.items()}
# What QEMU takes without -cpu; libvirt writes it out, where its own default is no other.
_DEFAULTS: Final = {"x86_64": "qemu64", "i686": "qemu32", "loongarch64": "la464"}


def model_from(layout: Layout) -> CpuModel | None:
    """Return the CPU model of a running VM as libvirt says it, or None where QEMU does not tell it."""
    name = layout.slots[0].model if layout.slots else None
    return None if name is None else _from_name(name)


def _from_name(name: str) -> CpuModel:
    mode = _MODES.get(name)
    if mode is None:
        return CpuModel("custom", name)
    return CpuModel(mode, migratable="on" if mode == "host-passthrough" else None)


def cpu_parts(model: CpuModel) -> tuple[Mapping[str, str], tuple[Node, ...]]:
    """Return the attributes of ``<cpu>``, and what is in it, that say *model*.

    libvirt is asked for this very model, and not to check it against the host: QEMU runs it.
    """
    if model.mode == "custom":
        said = {"mode": "custom", "match": "exact", "check": "none"}
        return said, (Node("model", {"fallback": "forbid"}, model.model or ""),)
    migratable = {} if model.migratable is None else {"migratable": model.migratable}
    return {"mode": model.mode, "check": "none", **migratable}, ()


def mark_node(layout: Layout) -> Node:
    """Return what goes under ``<metadata>`` of a document that is written from *layout*."""
    name = layout.slots[0].model if layout.slots else None
    told = {} if name is None else {"model": name}
    return Node("qmpvcpu:cpu", {"xmlns:qmpvcpu": _NAMESPACE, **told, "features": "unknown"})


def has_mark(root: etree._Element) -> bool:
    """Tell whether a document was written from a running VM, by us."""
    return root.find(f"metadata/{CPU_MARK}") is not None


def is_as_written(root: etree._Element, model: CpuModel | None) -> bool:
    """Tell whether *model*, which the document names, is the one that its mark is of."""
    mark = root.find(f"metadata/{CPU_MARK}")
    if mark is None:
        return False
    name = mark.get("model")
    if name is None:  # libvirt fills in its own default
        return model is None or (model.mode == "custom" and model.model in _DEFAULTS.values())
    written = _from_name(name)
    return model is not None and (model.mode, model.model) == (written.mode, written.model)


def untold_of(root: etree._Element, model: CpuModel | None) -> str | None:
    """Return what QEMU did not tell of the CPU of a document that names *model*; None where somebody has added it."""
    if not is_as_written(root, model) or (model is not None and model.features):
        return None
    return CPU_MODEL if root.find(f"metadata/{CPU_MARK}[@model]") is None else CPU_FEATURES


def qemu_model(domain: DomainVcpus, arch: str) -> str | None:
    """Return QEMU's name of the model that a document asks for; None where it is QEMU's or the host's to choose."""
    model = domain.cpu or CpuModel("custom")
    if model.mode != "custom":
        return _MODELS.get(model.mode)
    if model.model is None:
        # Under KVM libvirt's default for s390x is host-model.
        return "qemu" if arch == "s390x" and domain.type == "qemu" else _DEFAULTS.get(arch)
    return model.model


def cpu_differs(layout: Layout, domain: DomainVcpus) -> str | None:
    """Say in what the CPU model of a running VM is not that of its document; None where it is, or is not known."""
    running = layout.slots[0].model if layout.slots else None
    named = qemu_model(domain, domain.arch or "x86_64")
    if running is None or named is None or is_same_model(named, running):
        return None
    said = f"names the CPU model {shorten(named, _MOST_QUOTED)}" if domain.cpu else f"names no CPU model ({named})"
    return f"the document {said}, and QEMU runs {running}: a VM that is started from it has another CPU"
