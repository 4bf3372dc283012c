"""The only door to the guest agent (qemu-ga): a session with it, what its answers mean, and whose number is whose.

The guest is hostile: every number, name and size that it sends is checked and bounded where it is read, every command
has a deadline, and QMP never waits for it.

- `client`: a QMPClient for the agent's dialect: no greeting, strays of earlier clients, 0xFF as a delimiter.
- `door`: `GuestAgent`, which connects, synchronises, asks one question at a time, and says why there is no answer.
- `answers`: what the agent's answers mean. Pure.
- `numbering`: which CPU of the guest is which vCPU. Pure.

Logging: ``qmpvcpu.agent`` has each question and answer at DEBUG.

Source: QEMU qga/qapi-schema.json, docs/interop/qemu-ga.rst.
"""

import qmpvcpu.qmp  # noqa: F401 - it finds qemu.qmp, even where another package of that name hides it
