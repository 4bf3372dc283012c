"""QEMU's threads on this host: the only door to ``/proc``, and to the kernel's scheduler.

- `files`: reads the kernel's files; hidden ones count as empty.
- `processes`: processes and threads.
- `cgroups`: what a cgroup lets them do.
- `sockets`: which sockets are connected to each other, and who has them open.
- `finding`: which process is the QEMU at the other end of a connection.
- `threads`: its threads: where they run, and putting them in their place.
- `birthplace`: its main thread, sent to where new threads should be born, and back home.
- `coresched`: threads that share no core with other programs.
- `facts`: what the host allows for them.
"""
