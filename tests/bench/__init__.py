"""Benchmarks: qmpvcpu beside raw QMP and libvirt, in turns, on this machine. By hand: ``bash tests/bench.sh``."""
