"""Floor 1: the values that everything else speaks in. Frozen values and pure functions; no I/O, no clock.

``vcpumap`` has sets of vCPU ids, ``layout`` the slots of a VM, ``vm`` all else that is known of it. ``options`` says
how a change is carried out, ``transition`` what it consists of and how it ended, ``verdicts`` what became of a vCPU.
``exported`` is what another QEMU must know. ``codec`` turns all of these to JSON and back, ``names`` checks text from
outside.
"""
