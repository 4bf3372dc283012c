"""Floor 5: one running VM. The shell around the engine: sends, reads, waits, records; decides nothing by itself."""

from qmpvcpu.controller.attaching import attach
from qmpvcpu.controller.controller import VcpuController
from qmpvcpu.controller.migration import Export, check_target, confirm_target
from qmpvcpu.controller.request import UnplugRequest
from qmpvcpu.controller.stream import EventStream

__all__ = [
    "EventStream",
    "Export",
    "UnplugRequest",
    "VcpuController",
    "attach",
    "check_target",
    "confirm_target",
]
