"""QEMU's threads on this host: the only door to ``/proc``, and to the kernel's scheduler.

- `processes`: what the kernel says about processes.
- `finding`: which process is the QEMU at the other end of a connection.
- `threads`: its threads, looked at and put in their place.
- `coresched`: threads that share a core with nobody else.
- `facts`: what the host allows for them.
"""
