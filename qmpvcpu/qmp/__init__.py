"""Floor 4: one QMP session with a QEMU. The only door to qemu.qmp.

It adds what `qemu.qmp.QMPClient` leaves to its user: a deadline on everything, a clear error of its own for each way
of failing to connect, loss that is noticed at once and explained, events as calls in wire order.

- `address`: sockets and /proc, no QMP: reading an address, connecting to it, who is at the other end.
- `wire`: a QMPClient of our own on such a socket: greeting, negotiation, its end and the reason of it.
- `session`: `Monitor`, on a client of our own or on one that was given.

Logging: ``qmpvcpu.qmp`` has the exchange at DEBUG, one line per message, with the extra fields ``vm`` (address),
``direction`` (``sent``, ``received`` or ``event``) and ``qmp`` (the message). qemu.qmp reports failures of our own
connections itself, at ERROR, on ``qemu.qmp.protocol.qmpvcpu``; as each also reaches the caller as an exception, that
logger has a `logging.NullHandler`: nothing is printed unless the application configured logging.
"""
