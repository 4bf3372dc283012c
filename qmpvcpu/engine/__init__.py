"""Floor 3: the core. Pure: no I/O, no clock (callers pass the time).

``engine`` takes inputs and returns effects; both are values in ``messages``. ``vmstate`` is what is known of the VM,
with each ``removal``; ``intents`` is what is wanted of it. ``transition`` is one change: a ``batch`` of steps
(``steprun``) there, and one back if it turns. ``answers`` says what the end of a step means for its caller.
"""
