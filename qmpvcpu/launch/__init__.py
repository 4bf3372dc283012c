"""Floor 3: the QEMU arguments that rebuild a VM's vCPUs, with their holes and in their order. Pure: no I/O.

``arguments`` takes a domain document's vCPU side, or a live layout. There are two ways to use what it returns: all of
it on the command line (``argv``), or the machine alone (``boot_argv``, with ``-S`` or ``-incoming``) and then
``replay``, which has QEMU itself say where each vCPU goes.

Source: libvirt src/qemu/qemu_command.c, and its command lines as measured with libvirt 9.0.0 on QEMU 7.2.22 and
10.0.2; QEMU qapi/machine.json.
"""

from qmpvcpu.launch.arguments import LaunchArguments, arguments

__all__ = ["LaunchArguments", "arguments"]
