"""Floor 3: what QEMU and the guest say, turned into what is known. Pure: no I/O, no clock (callers pass the time).

``removal`` is one removal as a table of transitions. ``engine`` is one VM: what comes in, judged; what is held to be
so then stands in its ``ledger``, slot by slot in ``slots``. ``transition`` is one change of a whole map: a ``batch``
of ``work`` there, and one back if it turns; what is out of a batch, and waited for, is ``outstanding``.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.engine.batch import Batch
    from qmpvcpu.engine.engine import Engine
    from qmpvcpu.engine.ledger import Read
    from qmpvcpu.engine.removal import TRANSITIONS, Evidence, IllegalEvidenceError, Removal, State
    from qmpvcpu.engine.transition import Phase, Transition
    from qmpvcpu.engine.work import Effect, LastLook, Look, Save, Send, Stage, Terms, Work

__all__ = [
    "TRANSITIONS",
    "Batch",
    "Effect",
    "Engine",
    "Evidence",
    "IllegalEvidenceError",
    "LastLook",
    "Look",
    "Phase",
    "Read",
    "Removal",
    "Save",
    "Send",
    "Stage",
    "State",
    "Terms",
    "Transition",
    "Work",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, __all__, ("removal", "ledger", "engine", "work", "batch", "transition"))
