"""QEMU's threads on this host: the only door to ``/proc``, and to the kernel's scheduler.

- `files`: what the kernel's files say, nothing where they are hidden.
- `processes`: processes and threads.
- `cgroups`: what a cgroup lets them do.
- `sockets`: which sockets are connected to each other, and who has them open.
- `finding`: which process is the QEMU at the other end of a connection.
- `threads`: its threads, looked at and put in their place.
- `birthplace`: its main thread, sent to where new threads are to be born, and back home.
- `coresched`: threads that share a core with nobody else.
- `facts`: what the host allows for them.
"""
