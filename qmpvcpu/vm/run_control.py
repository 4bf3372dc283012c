"""What a certification does to a VM, and sees of it, besides changing its vCPUs."""

from qmpvcpu.vm.driver import Driver


class RunControl:
    """What one VM is paused, resumed and reset with; every call raises MonitorError if QEMU is gone or silent."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def pause(self) -> None:
        """Stop the vCPUs: the guest answers nothing until ``resume``."""
        await self._send("stop")

    async def resume(self) -> None:
        """Let the vCPUs run; one that runs already goes on."""
        await self._send("cont")

    async def reset(self) -> None:
        """Reset the VM as its reset button would. One that is paused stays so, and boots once it is resumed."""
        await self._send("system_reset")

    async def quit(self) -> None:
        """End QEMU, which writes what it still has of its disks; the guest is not asked to shut down."""
        await self._send("quit")

    async def has_started(self, vcpu: int) -> bool:
        """Read whether all of the slot of *vcpu* has run guest code."""
        driver = self._driver
        await driver.check_open()
        slot = driver.layout.slot_of(vcpu)
        return slot.first in await driver.connection.reader.started([slot])

    async def _send(self, command: str) -> None:
        driver = self._driver
        await driver.check_open()
        await driver.connection.monitor.execute(command, timeout=driver.engine.reply_timeout)
