"""Attributes and texts read as libvirt reads them; what it would refuse is collected."""

import re
from collections.abc import Collection

from lxml import etree

from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
from qmpvcpu.domainxml.safe_xml import line_of, text_of
from qmpvcpu.errors import DomainRuleError, DomainXmlError, InvalidMapError
from qmpvcpu.model.vcpumap import VcpuMap

# What C's strtoul takes before a number, as far as XML can hold it.
_UNSIGNED = re.compile(r"[ \t\n\r]*\+?([0-9]+)")
_SIGNED = re.compile(r"[ \t\n\r]*([+-]?)([0-9]+)")
_MOST_DIGITS = 19
_FEW_DIGITS = 10
UINT_MAX = 2**32 - 1
_INT_MAX = 2**31 - 1
_TRUTHS = {"yes": True, "no": False}
# Bytes in each, in any case.
_UNITS = {"": 1024, "b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_MOST_KIB = 2**53 - 1
# Hundreds of CPUs for each of thousands of vCPUs; a hostile document names all of them for each.
_MOST_CPUS_NAMED = 2**20
# Nobody reads more, and a hostile document can break a rule with each of its tags.
_MOST_FOUND = 1000


class AttributeReader:
    """Reads attributes, and collects what libvirt would refuse, in the order in which it is asked for them.

    A refused value is read as if it were absent.

    Attributes:
        broken: The broken rules, the first thousand of them.
        count: How many there are.
    """

    def __init__(self) -> None:
        self.broken: list[DomainRuleError] = []
        self.count = 0
        self._maps: dict[str, VcpuMap | None] = {}
        self._named = 0

    def refuse(
        self,
        rule: DomainRule,
        element: etree._Element,
        attribute: str | None,
        says: str,
        *,
        value: str | None = None,
        detail: str = "",
        stage: RuleStage = RuleStage.DEFINE,
    ) -> None:
        """Note a broken *rule*; *says* is libvirt's message, and *value* defaults to the attribute's."""
        self.count += 1
        if self.count > _MOST_FOUND:
            return
        tags = [str(each.tag) for each in element.iterancestors()][:-1]
        self.broken.append(
            DomainRuleError(
                rule,
                element="/".join([*reversed(tags), str(element.tag)]),
                attribute=attribute,
                value=element.get(attribute) if value is None and attribute else value,
                line=line_of(element),
                stage=stage,
                detail=detail,
                libvirt_says=says,
            )
        )

    def required(self, element: etree._Element, attribute: str) -> bool:
        """Tell whether a mandatory attribute is present."""
        if element.get(attribute) is not None:
            return True
        says = f"Missing required attribute '{attribute}' in element '{element.tag!s}'"
        self.refuse(DomainRule.ATTRIBUTE_MISSING, element, attribute, says)
        return False

    def number(self, element: etree._Element, attribute: str) -> int | None:
        """Return an unsigned 32-bit number, or None if it is absent."""
        text = element.get(attribute)
        if text is None:
            return None
        # A shortcut for most of them: each vCPU has some.
        if len(text) < _FEW_DIGITS and text.isascii() and text.isdigit():
            return int(text)
        found = unsigned(text)
        if found is None or found > UINT_MAX:
            self._refuse_value(DomainRule.NOT_A_NUMBER, element, attribute, ". Expected non-negative integer value")
            return None
        return found

    def integer(self, element: etree._Element, attribute: str) -> int | None:
        """Return a signed 32-bit number, which must be there."""
        found = signed(element.get(attribute, ""))
        if found is None or not -_INT_MAX - 1 <= found <= _INT_MAX:
            self._refuse_value(DomainRule.NOT_AN_INTEGER, element, attribute, ". Expected integer value")
            return None
        return found

    def truth(self, element: etree._Element, attribute: str) -> bool | None:
        """Return what a yes or no says, or None if it is absent."""
        text = element.get(attribute)
        if text is None:
            return None
        if text in _TRUTHS:
            return _TRUTHS[text]
        self._refuse_value(DomainRule.NOT_YES_OR_NO, element, attribute, ".")
        return None

    def choice(
        self, element: etree._Element, attribute: str, choices: Collection[str], *, says: str | None = None
    ) -> str | None:
        """Return one of *choices*, or None if it is absent; *says* is libvirt's message if it has its own."""
        text = element.get(attribute)
        if text is None or text in choices:
            return text
        detail = f"one of {', '.join(choices)}"
        self._refuse_value(DomainRule.NOT_A_CHOICE, element, attribute, ".", says=says, detail=detail)
        return None

    def cpuset(
        self,
        element: etree._Element,
        attribute: str,
        *,
        may_be_empty: bool = False,
        says: str | None = None,
        says_empty: str | None = None,
    ) -> VcpuMap | None:
        """Return a set of ids, or None if it is absent; equal texts give the same object.

        *says* and *says_empty* are libvirt's messages if it has its own.

        Raises:
            DomainXmlError: The document names more CPUs than any honest one.
        """
        text = element.get(attribute)
        if text is None:
            return None
        if text not in self._maps:
            found = _map_of(text)
            self._maps[text] = found
            self.count_named(element, found or ())
        found = self._maps[text]
        if found is None:
            told = says or f"Failed to parse bitmap '{text}'"
            self.refuse(DomainRule.CPUSET_UNREADABLE, element, attribute, told)
        elif not found and not may_be_empty:
            says = says_empty or f"Invalid value of '{attribute}': {text}"
            self.refuse(DomainRule.CPUSET_EMPTY, element, attribute, says)
            return None
        return found

    def count_named(self, element: etree._Element, cpus: Collection[int]) -> None:
        """Count named CPUs, repeated ones too: each costs time or memory.

        Raises:
            DomainXmlError: They are more than any document needs.
        """
        self._named += len(cpus)
        if self._named > _MOST_CPUS_NAMED:
            raise DomainXmlError(f"its cpusets name more than {_MOST_CPUS_NAMED} CPUs in all", line=line_of(element))

    def kib(self, element: etree._Element, attribute: str | None = None) -> int | None:
        """Return an amount of memory in KiB, rounded up, from *attribute* or the element's text."""
        text = text_of(element) if attribute is None else element.get(attribute, "")
        where = "./@memory" if attribute else f"./{element.tag!s}[1]"
        if not text:
            return None
        found = unsigned(text)
        if found is None or found >= 2**64:
            says = f"Invalid value '{text}' for element or attribute '{where}'"
            self.refuse(DomainRule.MEMORY_NOT_A_NUMBER, element, attribute, says, value=text)
            return None
        unit = element.get("unit", "")
        if unit.lower() not in _UNITS:
            self.refuse(DomainRule.MEMORY_UNIT, element, "unit", f"unknown suffix '{unit}'")
            return None
        kib = -(-found * _UNITS[unit.lower()] // 1024)
        if kib > _MOST_KIB:
            self.refuse(DomainRule.MEMORY_TOO_LARGE, element, attribute, "value too large", value=text)
            return None
        return kib

    def _refuse_value(
        self,
        rule: DomainRule,
        element: etree._Element,
        attribute: str,
        ending: str,
        *,
        says: str | None = None,
        detail: str = "",
    ) -> None:
        told = f"Invalid value for attribute '{attribute}' in element '{element.tag!s}': '{element.get(attribute)}'"
        self.refuse(rule, element, attribute, says or told + ending, detail=detail)


def unsigned(text: str) -> int | None:
    """Return the number that C's ``strtoul`` reads if nothing follows it; too large ones are 2**64 or more."""
    if len(text) <= _MOST_DIGITS and text.isascii() and text.isdecimal():  # nearly all are, in thousands
        return int(text)
    found = _UNSIGNED.fullmatch(text)
    return None if found is None else _bounded(found[1])


def signed(text: str) -> int | None:
    """Return the number that C's ``strtol`` reads if nothing follows it; too large ones are beyond 64 bits."""
    found = _SIGNED.fullmatch(text)
    if found is None:
        return None
    return -_bounded(found[2]) if found[1] == "-" else _bounded(found[2])


def _bounded(digits: str) -> int:
    # int() takes quadratic time for megabytes of digits.
    rest = digits.lstrip("0")
    return int(rest or "0") if len(rest) <= _MOST_DIGITS else 2**64


def _map_of(text: str) -> VcpuMap | None:
    # libvirt skips these spaces only, and accepts one comma at the end.
    body = text.strip(" \t\n\r").removesuffix(",")
    if not body.isascii() or not body.strip():
        return None
    try:
        # "0,^0" names nothing, and lets a set start with an exclusion: libvirt reads that, as the empty set.
        return VcpuMap.parse(f"0,^0,{body}")
    except InvalidMapError:
        return None
