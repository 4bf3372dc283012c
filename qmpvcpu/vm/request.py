"""UnplugRequest: one removal that QEMU has accepted, and the wait for its answer."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.errors import CommandRejectedError, QmpVcpuError, UnplugPendingError, UnplugRefusedError
from qmpvcpu.given import checked
from qmpvcpu.model.verdicts import Pending, Refused, Unplugged

if TYPE_CHECKING:
    from qmpvcpu.model.vcpumap import VcpuMap

UnplugVerdict = Unplugged | Refused | Pending


class UnplugRequest:
    """A handle on one removal; it outlives every timeout, as the removal does.

    Attributes:
        ids: The vCPU ids of the slot.
        joined: True if the removal was under way already, and nothing was sent.
    """

    def __init__(
        self, removal: Removal, wait: Callable[[Removal, float | None], Awaitable[UnplugVerdict]], *, joined: bool
    ) -> None:
        self._removal = removal
        self._wait = wait
        self.ids: VcpuMap = removal.ids
        self.joined = joined

    @property
    def verdict(self) -> Unplugged | Refused | None:
        """The verdict, or None while there is none (see ``wait`` for PENDING)."""
        return verdict_on(self._removal)

    @checked
    async def wait(self, timeout: float | None = None) -> UnplugVerdict:
        """Wait for the guest's answer.

        May be called again after PENDING, by several tasks at once, and cancelled: the removal goes on.

        Args:
            timeout: Seconds from now; None waits for ever, 0 only looks.

        Returns:
            UNPLUGGED, REFUSED, or PENDING if *timeout* passed; a timeout is never raised.

        Raises:
            MonitorLostError: The connection was lost, or the VM closed, before the answer.
        """
        return await self._wait(self._removal, timeout)


def verdict_on(removal: Removal) -> Unplugged | Refused | None:
    """Return the guest's answer to *removal*, or None while there is none."""
    if removal.state is State.UNPLUGGED:
        return Unplugged(removal.ids, seconds=removal.seconds)
    if removal.state is State.REFUSED:
        return Refused(removal.ids, removal.code, removal.reason, seconds=removal.seconds)
    return None


def rejected_error(removal: Removal) -> CommandRejectedError:
    """Return the error that QEMU's rejection of *removal* is, for each of those who wait for it."""
    said = removal.rejection
    error_class, desc, hint = ("", "", "") if said is None else (said.error_class, said.desc, said.hint)
    sent = {"execute": "device_del"}
    return CommandRejectedError(error_class, desc, sent, action="unplug", ids=removal.ids, hint=hint)


def error_for(verdict: UnplugVerdict, timeout: float) -> QmpVcpuError | None:
    """Return the error that *verdict* is for a caller who wanted the vCPU gone within *timeout* seconds."""
    match verdict:
        case Refused():
            return UnplugRefusedError(verdict.ids, verdict.code, verdict.reason)
        case Pending():
            return UnplugPendingError(verdict.ids, timeout, acknowledged=verdict.acknowledged)
    return None
