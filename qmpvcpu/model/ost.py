"""What a guest answers through ACPI's _OST: source (what it speaks of) and status (what it says).

Source: ACPI 6.5, section 6.3.5 "_OST (OSPM Status Indication)"; the sources and statuses that QEMU forwards in
``ACPI_DEVICE_OST`` and keeps in ``query-acpi-ospm-status``.
"""

import enum
from dataclasses import dataclass

_INSERTION_SOURCES = frozenset({0x1, 0x200})  # device check; insertion processing
_EJECTION_SOURCES = frozenset({0x3, 0x103})  # eject request; ejection processing

_EJECTION_REASONS = {
    0x01: "non-specific failure",
    0x02: "unrecognized notify code",
    0x80: "device is locked",
    0x81: "device is in use by an application",
    0x82: "device is busy",
    0x83: "ejection dependency is busy or not supported",
}
_INSERTION_REASONS = {
    0x01: "non-specific failure",
    0x02: "unrecognized notify code",
    0x81: "device driver load failure",
    0x82: "device not supported by the OS",
}


class OstStatus(enum.Enum):
    """How one answer is to be taken."""

    SUCCESS = "success"
    IN_PROGRESS = "in progress"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class OstAnswer:
    """One _OST evaluation of the guest.

    Attributes:
        source: ACPI source event code; 3 and 0x103 speak of an ejection, 1 and 0x200 of an insertion.
        code: ACPI status code.
    """

    source: int
    code: int

    @property
    def is_ejection(self) -> bool:
        """True if this answers a request to unplug."""
        return self.source in _EJECTION_SOURCES

    @property
    def is_insertion(self) -> bool:
        """True if this answers a plug."""
        return self.source in _INSERTION_SOURCES

    @property
    def status(self) -> OstStatus:
        """Success, in progress, or failure.

        An ejection of 0x84 ("in progress") precedes success and refusal alike; an insertion of 0x80 is
        ACPI's "insertion in progress".
        """
        if self.code == 0:
            return OstStatus.SUCCESS
        progress = 0x84 if self.is_ejection else 0x80
        return OstStatus.IN_PROGRESS if self.code == progress else OstStatus.FAILURE

    @property
    def reason(self) -> str:
        """The status in words."""
        status = self.status
        if status is not OstStatus.FAILURE:
            return str(status.value)
        table = _EJECTION_REASONS if self.is_ejection else _INSERTION_REASONS
        return table.get(self.code, f"status {self.code:#x}, unknown to ACPI")
