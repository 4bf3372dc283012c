"""ObservedVm: what is known of a VM, and waiting for it to become otherwise, as users see them."""

from collections.abc import Callable

from qmpvcpu.errors import printable
from qmpvcpu.given import checked
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vm import Capabilities
from qmpvcpu.vm.session import Session
from qmpvcpu.vm.stream import EventStream


class ObservedVm:
    """One VM, looked at; the part of VcpuController that changes nothing."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._engine = session.engine
        self._let_go = False

    def __repr__(self) -> str:
        layout = self.layout
        pending = f", pending {layout.pending}" if layout.pending else ""
        return f"<{type(self).__name__} {printable(self.address)}: vCPUs {layout.enabled} of {layout.max}{pending}>"

    @property
    def layout(self) -> Layout:
        """All slots, as known now; a new object after each change."""
        return self._engine.layout

    @property
    def capabilities(self) -> Capabilities:
        """What this VM can do, and what its QEMU is known not to survive."""
        return Capabilities.of(self._engine.layout.vm)

    @property
    def address(self) -> str:
        """Where QMP is spoken, for messages."""
        return self._session.monitor.address

    @property
    def peer_pid(self) -> int | None:
        """Process that listens where QMP is spoken: QEMU, or who started it; None where it is not on this host."""
        return self._session.monitor.peer_pid

    def events(self) -> EventStream:
        """Return a stream of all events from now on; see EventStream."""
        return self._session.audience.stream()

    async def refresh(self) -> Layout:
        """Read the VM again and return its layout.

        Raises:
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        return await self._session.refresh()

    @checked
    async def wait_for(
        self,
        predicate: Callable[[Layout], object],
        *,
        timeout: float | None = None,
    ) -> Layout:
        """Wait until *predicate* holds for the layout, and return that layout.

        It is tried at once and at every change; nothing is polled.

        Raises:
            WaitTimeoutError: It did not hold within *timeout* seconds.
            MonitorLostError: The connection was lost.
        """
        return await self._session.wait_for(predicate, timeout)

    @checked
    async def wait_settled(self, *, timeout: float | None = None) -> Layout:
        """Wait until no removal is pending, and return the layout.

        Raises:
            WaitTimeoutError: One still was after *timeout* seconds.
            MonitorLostError: The connection was lost.
        """
        return await self.wait_for(lambda layout: not layout.pending_slots, timeout=timeout)

    async def close(self) -> None:
        """Let go of the VM: the VM and a borrowed client stay as they are. Idempotent.

        Commands in flight get a second to be answered, so that their outcome is recorded. Whoever still waits gets
        MonitorLostError.
        """
        self._let_go = True
        await self._session.close()
