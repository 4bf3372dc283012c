"""``-cpu``: the model that a domain names, as QEMU spells it, and the type of CPU that ``device_add`` then takes."""

from collections.abc import Iterator
from typing import Final

from qmpvcpu.domainxml import CpuModel, DomainVcpus
from qmpvcpu.domainxml.cpumodel import qemu_model
from qmpvcpu.errors import DomainXmlError, shorten
from qmpvcpu.model.shapes import is_cpu_type, is_word

__all__ = ["X86", "checked_type", "cpu_of", "driver_of"]

X86: Final = ("x86_64", "i686")

_TYPES: Final = {
    "x86_64": "x86_64-cpu",
    "i686": "i386-cpu",
    "s390x": "s390x-cpu",
    "loongarch64": "loongarch-cpu",
}
_MODES: Final = ("custom", "host-model", "host-passthrough", "maximum")
# libvirt's name where QEMU's is another; besides, QEMU has a dash wherever libvirt has an underscore.
_RENAMED: Final = {"pclmuldq": "pclmulqdq"}
# What libvirt has a name for and QEMU no switch: it follows from other features, or QEMU never had it.
_NO_SWITCH: Final = frozenset({"osxsave", "ospke", "cmt", "mbm_total", "mbm_local"})
_SWITCH: Final = {"force": "on", "require": "on", "optional": "on", "disable": "off", "forbid": "off"}


def cpu_of(domain: DomainVcpus, arch: str) -> str | None:
    """Return the value of ``-cpu``, or None where it is QEMU's to choose.

    Raises:
        DomainXmlError: A name in it cannot be one, or a mode or policy is none of libvirt's.
    """
    model = domain.cpu or CpuModel("custom")
    name = qemu_model(domain, arch)
    if model.mode not in _MODES:
        raise DomainXmlError(f"<cpu mode={shorten(model.mode)}> is none of libvirt's modes")
    if model.mode == "host-model":
        name = "host" if domain.type == "kvm" else "max"
    if name is None:
        return None
    if not is_word(name):
        raise DomainXmlError(f"<model>: {shorten(name)} is no model that QEMU could have")
    return ",".join([name, *_migratable(model, arch), *_features(model, arch)])


def _migratable(model: CpuModel, arch: str) -> Iterator[str]:
    default = "on" if model.mode == "host-passthrough" else None
    said = model.migratable or default
    if arch in X86 and said is not None and model.mode in {"host-passthrough", "maximum"}:
        yield f"migratable={said}"


def _features(model: CpuModel, arch: str) -> Iterator[str]:
    for name, policy in model.features.items():
        switch = _SWITCH.get(policy)
        if switch is None:
            raise DomainXmlError(f"<feature policy={shorten(policy)}> is none of libvirt's policies")
        if not is_word(name):
            raise DomainXmlError(f"<feature>: {shorten(name)} is no feature that QEMU could have")
        if arch not in X86:
            yield f"{name}={switch}"
        elif name not in _NO_SWITCH:
            yield f"{_RENAMED.get(name, name).replace('_', '-')}={switch}"


def driver_of(cpu: str | None, arch: str) -> str | None:
    """Return the type of CPU that ``device_add`` takes under ``-cpu`` *cpu*; None where only QEMU knows it.

    Raises:
        DomainXmlError: *cpu* does not begin with a model that could be one.
    """
    kind = _TYPES.get(arch)
    return None if cpu is None or kind is None else checked_type(f"{cpu.partition(',')[0]}-{kind}")


def checked_type(cpu_type: str) -> str:
    """Return *cpu_type*, which is about to be an argument.

    Raises:
        DomainXmlError: It is no CPU's type.
    """
    if not is_cpu_type(cpu_type):
        raise DomainXmlError(f"{shorten(cpu_type)} is no type of a CPU that QEMU could have")
    return cpu_type
