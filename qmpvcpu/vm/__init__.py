"""Floor 6: one running VM. The shell around the engine: sends, reads, records; decides nothing.

``attaching`` makes a ``controller`` with its ``driver``, which carries out what the engine asks for. ``connection``
is the way to QEMU, ``record_writer`` keeps the record, ``next_boot`` the next boot, ``subscribers`` holds those who
wait for news, and ``migrating`` is what an export is made of.
"""
