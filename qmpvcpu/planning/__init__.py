"""Floor 2: what may be done to a VM, and in which order, decided from what is known of it. Pure: no I/O, no clock.

``checks`` decides whether one step may be sent; ``plan`` turns a target into steps; ``recovery`` finds the target
that finishes or reverts an interrupted transition; ``replay`` finds the vCPUs that a stopped QEMU lacks;
``compatibility`` decides whether another QEMU can take the VM over.
"""
