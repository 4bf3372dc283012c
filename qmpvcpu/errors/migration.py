"""A VM that moves to another QEMU."""

from qmpvcpu.errors.base import Outcome, QmpVcpuError


class MigrationError(QmpVcpuError):
    """A VM cannot be moved, or cannot be said to have arrived."""


class TargetLostError(MigrationError):
    """The destination did not take the VM over, as far as can be told: it is gone, silent, or still waiting.

    Attributes:
        vm: The VM's name.
        why: What was seen of the destination.
    """

    outcome = Outcome.UNKNOWN

    def __init__(self, vm: str, why: str) -> None:
        super().__init__(
            f"the destination of VM {vm!r} has not taken it over: {why}. The source still has the VM, even where it"
            " reports completed and postmigrate: do not quit it; make sure that the destination is dead, then"
            " take_back(destination_is_gone=True) on the source"
        )
        self.vm = vm
        self.why = why


class TakeBackError(MigrationError):
    """The source was not made to run the VM again; or it was, and does not.

    Attributes:
        vm: The VM's name.
        why: What stands against it.
        run_state: What QEMU says that the VM does, or None if it was not asked.
    """

    def __init__(
        self, vm: str, why: str, *, run_state: str | None = None, outcome: Outcome = Outcome.UNCHANGED
    ) -> None:
        super().__init__(f"VM {vm!r} is not taken back: {why}")
        self.vm = vm
        self.why = why
        self.run_state = run_state
        self.outcome = outcome
