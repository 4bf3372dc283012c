"""The words of ``-cpu`` that libvirt takes from all over a document, besides the model and its features.

What is not read here, though it changes QEMU's CPUs or cells, is named. That is also what libvirt would refuse, and
what newer versions of it may know.

Source: libvirt src/qemu/qemu_command.c, qemuBuildCpuCommandLine; the words and their order as measured with libvirt
9.0.0 (``tests/libvirt/test_launch.py``).
"""

import re
from collections.abc import Mapping
from typing import Final

from lxml import etree

from qmpvcpu.domainxml.attributes import unsigned
from qmpvcpu.domainxml.cpu import MODES_WITHOUT_MODEL
from qmpvcpu.domainxml.domain import CpuModel

_X86: Final = ("x86_64", "i686")
_UNREAD: Final = (
    "cpu[@match='minimum']",
    "cpu[@deprecated_features]",
    "cpu/numa/cell[@memAccess]",
    "cpu/numa/cell[@discard]",
    "cpu/numa/cell/distances",
    "cpu/numa/cell/cache",
    "cpu/numa/interconnects",
    "memoryBacking",
    "numatune",
)
# A text that stays one word of -cpu: no comma.
_TEXT: Final = re.compile(r"[ -+\--~]{0,12}")

# For an attribute's value the word of -cpu, "" for none; under None what libvirt takes where the attribute is absent.
_Words = Mapping[str | None, str]

_TIMERS: Final[Mapping[str, _Words]] = {
    "kvmclock": {None: "", "yes": "kvmclock=on", "no": "kvmclock=off"},
    "hypervclock": {None: "", "yes": "hv-time=on", "no": ""},
}
_APIC: Final[_Words] = {None: "", "on": "kvm-pv-eoi=on", "off": "kvm-pv-eoi=off"}
_PVSPINLOCK: Final[_Words] = {None: "kvm-pv-unhalt=on", "on": "kvm-pv-unhalt=on", "off": "kvm-pv-unhalt=off"}
_HYPERV_MODE: Final[_Words] = {None: "", "custom": "", "passthrough": "hv-passthrough=on"}
# In libvirt's order.
_HYPERV: Final[Mapping[str, str]] = {
    "relaxed": "hv-relaxed=on",
    "vapic": "hv-vapic=on",
    "spinlocks": "hv-spinlocks={retries:#x}",
    "vpindex": "hv-vpindex=on",
    "runtime": "hv-runtime=on",
    "synic": "hv-synic=on",
    "stimer": "hv-stimer=on",
    "reset": "hv-reset=on",
    "vendor_id": "hv-vendor-id={value}",
    "frequencies": "hv-frequencies=on",
    "reenlightenment": "hv-reenlightenment=on",
    "tlbflush": "hv-tlbflush=on",
    "ipi": "hv-ipi=on",
    "evmcs": "hv-evmcs=on",
    "avic": "hv-avic=on",
}
_KVM: Final[Mapping[str, _Words]] = {
    "hidden": {"on": "kvm=off", "off": ""},
    "hint-dedicated": {"on": "kvm-hint-dedicated=on", "off": ""},
    "poll-control": {"on": "kvm-poll-control=on", "off": ""},
    "pv-ipi": {"on": "", "off": "kvm-pv-ipi=off"},
}
_PMU: Final[_Words] = {None: "pmu=on", "on": "pmu=on", "off": "pmu=off"}
_QEMU: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_OF_VCPUS: Final = frozenset({"-cpu", "-smp", "-numa"})
_CPU_DEVICE: Final = re.compile(r"[^,]*-(?:cpu|cpu-core)(?:,|$)|\{.*-(?:cpu|cpu-core)\"")


class CpuOptions:
    """The words that a document asks for, read when this is made.

    Args:
        root: The document.
        model: The model that it names, or None.
        arch: libvirt's name of its architecture.

    Attributes:
        words: The words, in libvirt's order.
        unread: Where the document asks for more, as paths.
    """

    def __init__(self, root: etree._Element, model: CpuModel | None, arch: str) -> None:
        self.words: list[str] = []
        self.unread: dict[str, None] = {}
        self._root = root
        self._is_x86 = arch in _X86
        self._is_host = model is not None and model.mode in MODES_WITHOUT_MODEL
        for timer in root.iterfind("clock/timer"):
            self._timer(timer)
        for element in self._last("features/apic"):
            self._switch("features/apic", element, "eoi", _APIC)
        for element in self._last("features/pvspinlock"):
            self._switch("features/pvspinlock", element, "state", _PVSPINLOCK)
        self._hyperv()
        if root.find("devices/panic[@model='hyperv']") is not None:
            self._add("devices/panic[@model='hyperv']", "hv-crash")
        self._kvm()
        for element in self._last("features/pmu"):
            self._switch("features/pmu", element, "state", _PMU, everywhere=True)
        self._cache()
        self._physical_address()
        named = root.find("cpu/model")
        if (
            named is not None
            and named.get("vendor_id")
            and not self._is_host
            and (model is None or not model.vendor_id)
        ):
            self.unread["cpu/model[@vendor_id]"] = None
        self.unread |= {path: None for path in _UNREAD if root.find(path) is not None}
        given = [each.get("value", "") for each in root.iterfind(f"{_QEMU}commandline/{_QEMU}arg")]
        if any(each.replace("--", "-", 1) in _OF_VCPUS or _CPU_DEVICE.match(each) for each in given):
            self.unread["qemu:commandline"] = None

    def _add(self, path: str, word: str, *, everywhere: bool = False) -> None:
        """Take a *word*; on other architectures than x86 libvirt has words of its own."""
        if word and (self._is_x86 or everywhere):
            self.words.append(word)
        elif word:
            self.unread[path] = None

    def _switch(
        self, path: str, element: etree._Element, attribute: str, words: _Words, *, everywhere: bool = False
    ) -> None:
        word = words.get(element.get(attribute))
        if word is None:
            self.unread[path] = None
        else:
            self._add(path, word, everywhere=everywhere)

    def _last(self, path: str) -> list[etree._Element]:
        """Return the last element at *path*, which is the one that libvirt heeds."""
        return self._root.findall(path)[-1:]

    def _timer(self, timer: etree._Element) -> None:
        name = timer.get("name", "")
        path = f"clock/timer[@name='{name}']"
        if name in _TIMERS:
            self._switch(path, timer, "present", _TIMERS[name])
        elif name == "tsc" and "frequency" in timer.attrib:
            frequency = unsigned(timer.get("frequency", ""))
            if frequency is None or frequency >= 2**63:
                self.unread[path] = None
            elif frequency:
                self._add(path, f"tsc-frequency={frequency}")
        elif name == "armvtimer":
            self.unread[path] = None

    def _hyperv(self) -> None:
        for element in self._last("features/hyperv"):
            self._switch("features/hyperv", element, "mode", _HYPERV_MODE)
        found = {str(each.tag): each for each in self._root.iterfind("features/hyperv/*")}
        if not found.keys() <= _HYPERV.keys():
            self.unread["features/hyperv"] = None
        for name, word in _HYPERV.items():
            if name in found:
                self._enlightenment(f"features/hyperv/{name}", found[name], word)

    def _enlightenment(self, path: str, element: etree._Element, word: str) -> None:
        if element.get("state") == "on":
            retries, value = unsigned(element.get("retries", "")), element.get("value")
            if "{retries" in word and (retries is None or retries >= 2**32):
                self.unread[path] = None
                return
            if "{value" in word and (value is None or not _TEXT.fullmatch(value)):
                self.unread[path] = None
                return
            word = word.format(retries=retries, value=value)
        self._switch(path, element, "state", {"on": word, "off": ""})
        if element.get("state") != "on":
            return
        for child in element.iterchildren("*"):
            if (element.tag, child.tag) == ("stimer", "direct"):
                self._switch(path, child, "state", {"on": "hv-stimer-direct=on", "off": ""})
            else:
                self.unread[path] = None

    def _kvm(self) -> None:
        found = {str(each.tag): each for each in self._root.iterfind("features/kvm/*")}
        if not found.keys() <= _KVM.keys():
            self.unread["features/kvm"] = None
        for name, words in _KVM.items():
            if name in found:
                self._switch(f"features/kvm/{name}", found[name], "state", words)

    def _cache(self) -> None:
        cache = self._root.find("cpu/cache")
        if cache is None:
            return
        off = ["host-cache-info=off"] if self._is_host else []
        match cache.get("mode"), cache.get("level"):
            case "emulate", "3":
                words = ["l3-cache=on", *off]
            case "passthrough", None if off:
                words = ["host-cache-info=on", "l3-cache=off"]
            case "disable", None:
                words = [*off, "l3-cache=off"]
            case _:
                self.unread["cpu/cache"] = None
                return
        for word in words:
            self._add("cpu/cache", word)

    def _physical_address(self) -> None:
        size = self._root.find("cpu/maxphysaddr")
        if size is None:
            return
        match size.get("mode"), size.get("bits"), size.get("limit"):
            case "emulate", str(bits), None if re.fullmatch("[0-9]{1,2}", bits):
                self._add("cpu/maxphysaddr", f"phys-bits={int(bits)}")
            case "passthrough", None, None:
                self._add("cpu/maxphysaddr", "host-phys-bits=on")
            case _:
                self.unread["cpu/maxphysaddr"] = None
