"""What an agent does, and to which VMs."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from qmpvcpu.model.hosts import Operation


@dataclass(frozen=True)
class AgentPolicy:
    """What an agent does, whoever asks; the server's permissions decide who may ask.

    Attributes:
        operations: What it does. Wishes for a map are SET, those for a count COUNT.
        vms: Patterns of VM names, as of ``fnmatch``; other VMs are neither changed nor shown.
    """

    operations: frozenset[Operation] = frozenset(Operation)
    vms: tuple[str, ...] = ("*",)

    @classmethod
    def read_only(cls, vms: tuple[str, ...] = ("*",)) -> "AgentPolicy":
        """Return the policy of an agent that changes nothing."""
        return cls(frozenset(each for each in Operation if each.only_reads), vms)

    @property
    def only_reads(self) -> bool:
        """True if it changes nothing."""
        return all(each.only_reads for each in self.operations)

    def covers(self, vm: str) -> bool:
        """Return True if the VM called *vm* is one of its own."""
        return any(fnmatchcase(vm, pattern) for pattern in self.vms)

    def refusal(self, operation: Operation, vm: str | None = None) -> str:
        """Return why *operation* is not done, to *vm* if one is named; "" if it is."""
        if operation not in self.operations:
            allowed = ", ".join(sorted(each.value for each in self.operations)) or "nothing"
            return f"this host's agent does not {operation.value}: it was started to do {allowed}"
        if vm is not None and not self.covers(vm):
            return f"this host's agent does not serve {vm}: it was started with --only {' '.join(self.vms)}"
        return ""
