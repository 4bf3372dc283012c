"""Floor 3: what QEMU and the guest say, turned into what is known. Pure: no I/O, no clock (callers pass the time).

``removal`` is one removal as a table of transitions. ``engine`` is one VM: what comes in, judged; what is held to be
so then stands in its ``ledger``, slot by slot in ``slots``. ``transition`` is one change of a whole map: a ``batch``
of ``work`` there, and one back if it turns; what is out of a batch, and waited for, is ``outstanding``.
"""
