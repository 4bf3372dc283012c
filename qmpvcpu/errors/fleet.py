"""Many VMs."""

from qmpvcpu.errors.base import QmpVcpuError


class SameVmError(QmpVcpuError):
    """Two addresses of a fleet lead to one VM, which is worked on once, under the other address; nothing was sent.

    Attributes:
        address: This address.
        other: The address under which the fleet has the VM.
    """

    def __init__(self, address: str, other: str, *, same_socket: bool) -> None:
        what = "the same socket as" if same_socket else "another QMP socket of the VM that this fleet has as"
        super().__init__(f"{address} is {what} {other}: it is worked on once, and nothing was sent here")
        self.address = address
        self.other = other


class SocketDirectoryError(QmpVcpuError):
    """A directory cannot be looked into for sockets.

    Attributes:
        path: The directory.
        why: What the kernel said.
    """

    def __init__(self, path: object, why: str) -> None:
        super().__init__(f"cannot look into {path} for QMP sockets: {why}")
        self.path = str(path)
        self.why = why
