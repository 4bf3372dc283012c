"""``-cpu``: the model that a domain names, as QEMU spells it, and the type of CPU that ``device_add`` then takes."""

import re
from collections.abc import Iterator
from typing import Final

from qmpvcpu.domainxml import CpuModel, DomainVcpus
from qmpvcpu.errors import DomainXmlError, shorten
from qmpvcpu.model.shapes import is_cpu_type, is_word

__all__ = ["X86", "checked_type", "cpu_of", "driver_of", "model_of"]

X86: Final = ("x86_64", "i686")

# What QEMU takes without -cpu; libvirt writes it out, where its own default is no other.
_DEFAULTS: Final = {"x86_64": "qemu64", "i686": "qemu32", "loongarch64": "la464"}
_TYPES: Final = {
    "x86_64": "x86_64-cpu",
    "i686": "i386-cpu",
    "s390x": "s390x-cpu",
    "loongarch64": "loongarch-cpu",
}
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
    name = _model_name(model, domain, arch)
    if name is None:
        return None
    return ",".join([name, *_migratable(model, arch), *_features(model, arch)])


def _model_name(model: CpuModel, domain: DomainVcpus, arch: str) -> str | None:
    if model.mode == "maximum":
        return "max"
    if model.mode == "host-passthrough":
        return "host"
    if model.mode == "host-model":
        return "host" if domain.type == "kvm" else "max"
    if model.mode != "custom":
        raise DomainXmlError(f"<cpu mode={shorten(model.mode)}> is none of libvirt's modes")
    if model.model is None:
        # Under KVM libvirt's default for s390x is host-model.
        return "qemu" if arch == "s390x" and domain.type == "qemu" else _DEFAULTS.get(arch)
    return _named("model", model.model)


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
        known = _named("feature", name)
        if arch not in X86:
            yield f"{known}={switch}"
        elif known not in _NO_SWITCH:
            yield f"{_RENAMED.get(known, known).replace('_', '-')}={switch}"


def _named(what: str, name: str) -> str:
    if not is_word(name):
        raise DomainXmlError(f"<{what}>: {shorten(name)} is no {what} that QEMU could have")
    return name


def driver_of(cpu: str | None, arch: str) -> str | None:
    """Return the type of CPU that ``device_add`` takes under ``-cpu`` *cpu*; None where only QEMU knows it.

    Raises:
        DomainXmlError: *cpu* does not begin with a model that could be one.
    """
    kind = _TYPES.get(arch)
    return None if cpu is None or kind is None else checked_type(f"{cpu.partition(',')[0]}-{kind}")


def model_of(cpu_type: str) -> str | None:
    """Return the ``-cpu`` model of QEMU's *cpu_type*; None where there is no type, on a machine without hotplug.

    Raises:
        DomainXmlError: It is no CPU's type.
    """
    return re.sub("-(?:[a-z0-9_]+-cpu|spapr-cpu-core)$", "", checked_type(cpu_type)) if cpu_type else None


def checked_type(cpu_type: str) -> str:
    """Return *cpu_type*, which is about to be an argument.

    Raises:
        DomainXmlError: It is no CPU's type.
    """
    if not is_cpu_type(cpu_type):
        raise DomainXmlError(f"{shorten(cpu_type)} is no type of a CPU that QEMU could have")
    return cpu_type
