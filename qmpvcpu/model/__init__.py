"""Floor 0: the values that everything else speaks in.

Rule of this floor: frozen values and pure functions; no I/O, no clock, nothing of the wire's spelling beyond the
names of QEMU's properties, which are passed through unchanged.
"""
