"""Change the virtual CPUs of a running QEMU."""
