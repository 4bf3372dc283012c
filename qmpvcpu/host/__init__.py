"""QEMU's threads on this host: the only door to ``/proc``, and to the kernel's scheduler.

- `processes`: what the kernel says about processes and threads.
"""
