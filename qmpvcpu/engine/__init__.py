"""Floor 3: what QEMU and the guest say, turned into what is known. Pure: no I/O, no clock (callers pass the time).

``removal`` is one removal as a table of transitions; ``engine`` is one VM: its layout, its removals, and what to
tell subscribers.
"""

from qmpvcpu.engine.engine import Engine, Read
from qmpvcpu.engine.removal import TRANSITIONS, Evidence, IllegalEvidenceError, Removal, State

__all__ = ["TRANSITIONS", "Engine", "Evidence", "IllegalEvidenceError", "Read", "Removal", "State"]
