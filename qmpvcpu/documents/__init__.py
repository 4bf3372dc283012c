"""Floor 4: the JSON documents that ``--json`` prints and hosts send each other, built from values and read back.

``docs/schema`` describes them. ``*_json`` builds a document, or a part of one, from a value, and ``*_from_json``
reads it back. Pure. Messages are in the library's words; the command line rewords what it prints.

A document may come from anybody: reading one only makes values of it.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.documents.events import event_from_json, event_json
    from qmpvcpu.documents.failures import code_of, error_from_json, error_json
    from qmpvcpu.documents.form import (
        BAD_RECORD,
        INTERRUPTED,
        NO_ANSWER,
        NOT_REACHED,
        NOT_SENT,
        REACHED,
        as_line,
        document,
    )
    from qmpvcpu.documents.layouts import layout_from_json, layout_json, state_json
    from qmpvcpu.documents.plans import plan_from_json, plan_json
    from qmpvcpu.documents.readings import statistics_from_json, statistics_json
    from qmpvcpu.documents.steps import plug_json, unplug_json

# A name is imported when it is first used: most commands need only a few.
_HOMES = {
    "qmpvcpu.documents.form": "BAD_RECORD INTERRUPTED NOT_REACHED NOT_SENT NO_ANSWER REACHED as_line document",
    "qmpvcpu.documents.events": "event_from_json event_json",
    "qmpvcpu.documents.failures": "code_of error_from_json error_json",
    "qmpvcpu.documents.layouts": "layout_from_json layout_json state_json",
    "qmpvcpu.documents.plans": "plan_from_json plan_json",
    "qmpvcpu.documents.readings": "statistics_from_json statistics_json",
    "qmpvcpu.documents.steps": "plug_json unplug_json",
}

__all__ = [
    "BAD_RECORD",
    "INTERRUPTED",
    "NOT_REACHED",
    "NOT_SENT",
    "NO_ANSWER",
    "REACHED",
    "as_line",
    "code_of",
    "document",
    "error_from_json",
    "error_json",
    "event_from_json",
    "event_json",
    "layout_from_json",
    "layout_json",
    "plan_from_json",
    "plan_json",
    "plug_json",
    "state_json",
    "statistics_from_json",
    "statistics_json",
    "unplug_json",
]

if not TYPE_CHECKING:  # so that type checkers still find a name that is missing
    __getattr__, __dir__ = lazily(__name__, _HOMES)
