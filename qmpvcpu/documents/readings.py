"""What vCPUs have done, as a document has it."""

from collections.abc import Mapping
from typing import Any

from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.statistics import VmRates, VmStatistics


def statistics_json(now: VmStatistics, rates: VmRates | None = None) -> dict[str, Any]:
    """Return a reading; each vCPU has its *rates* since the reading before, null where there is none."""
    said = to_json(now)
    for vcpu in said["vcpus"]:
        mine = None if rates is None else rates[vcpu["id"]]
        vcpu["rates"] = None if mine is None else {**to_json(mine), "idle": mine.idle}
    return {"seconds": None if rates is None else rates.seconds, **said}


def statistics_from_json(data: Mapping[str, Any]) -> VmStatistics:
    """Return the reading that ``statistics_json`` was given; its ``since`` tells the rates, which are not read.

    Raises:
        ValueError: It has another shape; the text names the key.
    """
    return from_json(VmStatistics, data)
