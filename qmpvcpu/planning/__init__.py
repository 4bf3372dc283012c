"""Floor 2: what may be done to a VM, and in which order, decided from what is known of it. Pure: no I/O, no clock.

``checks`` says of one step whether it may be sent; ``plan`` turns a wish into steps; ``recovery`` turns a transition
that was cut short into a wish; ``replaying`` finds what a stopped QEMU lacks of a VM's vCPUs; ``migrating`` says
whether another QEMU can take the VM over.
"""
