"""Floor 8: many VMs as one async context. Knows of no QMP: a VM of this host is a VcpuController.

- `scan`: which sockets a directory has.
- `results`: one VM's result, and all of them as they come.
- `merged`: the events of all.
- `told`: those that agents of other hosts tell, and who asked them for what.
- `transport`: what is asked of wherever the VMs are.
- `local`: the VMs of this host.
- `remote`: those of other hosts, whose agents carry wishes out.
- `wishes`: wishes, and what comes of them.
- `fleet`: `Fleet`.

Rule of this floor: VMs share nothing but the event loop. No deadline, error or overflow of one is another's.
"""

from qmpvcpu.fleet.fleet import Fleet
from qmpvcpu.fleet.merged import FleetEvents, VmEvent
from qmpvcpu.fleet.results import Results, VmResult
from qmpvcpu.fleet.told import Answered, Asked, MapState
from qmpvcpu.fleet.transport import Rescan

__all__ = ["Answered", "Asked", "Fleet", "FleetEvents", "MapState", "Rescan", "Results", "VmEvent", "VmResult"]
