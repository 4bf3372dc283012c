"""Floor 5: one running VM. The shell around the engine: sends, reads, waits, records; decides nothing by itself.

``attach`` makes a ``VcpuController`` (``controller``), whose parts stand on each other: ``observed`` changes
nothing, ``onevcpu`` changes one vCPU, ``wholemaps`` many. Under them ``session`` holds the connection, its
``audience`` whoever waits for news, ``keeper`` the record, ``nextboot`` the next boot; ``commands`` are the two that
change a VM, ``turns`` says who may send them now, ``applying`` carries a transition out.
"""

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
