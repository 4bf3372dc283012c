"""Statistics as JSON."""

from collections.abc import Mapping
from typing import Any

from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.statistics import VmRates, VmStatistics


def statistics_json(now: VmStatistics, rates: VmRates | None = None) -> dict[str, Any]:
    """Return a reading; each vCPU has its *rates* since the previous reading, or null without one."""
    said = to_json(now)
    for vcpu in said["vcpus"]:
        mine = None if rates is None else rates[vcpu["id"]]
        vcpu["rates"] = None if mine is None else {**to_json(mine), "idle": mine.idle}
    return {"seconds": None if rates is None else rates.seconds, **said}


def statistics_from_json(data: Mapping[str, Any]) -> VmStatistics:
    """Return the reading that ``statistics_json`` was given; rates are not read, since they follow from ``since``.

    Raises:
        ValueError: It has another shape; the text names the key.
    """
    return from_json(VmStatistics, data)
