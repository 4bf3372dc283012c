"""Benchmarks: ratios against raw QMP in the same run, on this machine. By hand: ``bash tests/bench.sh``."""
