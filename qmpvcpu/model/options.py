"""The options of a change, described once, and what may be chosen for them."""

import enum
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypedDict

from qmpvcpu.errors import shorten
from qmpvcpu.given import at_least, values

if TYPE_CHECKING:
    from qmpvcpu.model.placement import Placement, PlacementPolicy


class Affect(enum.Enum):
    """What a change applies to.

    LIVE: the running VM. CONFIG: its next boot; nothing is sent to QEMU. BOTH: both are checked first, then the
    running VM is changed, and the next boot only once that has succeeded.

    Source: libvirt, virDomainModificationImpact.
    """

    LIVE = "live"
    CONFIG = "config"
    BOTH = "both"


class OnFailure(enum.Enum):
    """What to do with the remaining steps when one fails.

    STOP: send nothing more; removals are requested one at a time, so that after a refusal nothing else leaves.
    CONTINUE: do the others all the same. REVERT: send nothing more, wait for what is in flight, and undo what this
    transition did, in reverse order. CONTINUE and REVERT request all removals at once.
    """

    STOP = "stop"
    CONTINUE = "continue"
    REVERT = "revert"


class Proof(enum.Enum):
    """What proves that a vCPU is plugged: the rungs of a ladder, each higher than the one before (``<``, ``max``).

    PRESENT: QEMU accepted the ``device_add``. ACKNOWLEDGED: the guest said so through _OST (advisory: it never
    comes for a plug in early boot, and a guest may say it without taking the CPU). On a machine whose guests cannot
    say it (pseries, s390x) a plug that waits for it is denied. STARTED: the vCPU has run guest code, as KVM's
    statistics or the run time of its thread show; no agent is needed, and where neither can be had
    (``VmInfo.start_unknowable``) the plug is denied. ONLINE: the guest's own list has it online, as
    the guest agent tells.

    A higher rung does not rest on the lower ones: a guest can start a vCPU without acknowledging it.
    """

    PRESENT = "present"
    ACKNOWLEDGED = "acknowledged"
    STARTED = "started"
    ONLINE = "online"

    __hash__ = object.__hash__  # members compare by identity; Enum's own hash is a call of Python for each look-up

    def __lt__(self, other: "Proof") -> bool:
        return _RUNGS.index(self) < _RUNGS.index(other)

    def __le__(self, other: "Proof") -> bool:
        return _RUNGS.index(self) <= _RUNGS.index(other)


_RUNGS: Final = tuple(Proof)


class Recovery(enum.Enum):
    """What to do with a transition that was interrupted.

    REPORT: report what a read shows of it, change nothing, and leave it interrupted. FINISH: go on to its target
    under its policy. REVERT: undo what it had done.
    """

    REPORT = "report"
    FINISH = "finish"
    REVERT = "revert"


class ChangeOptions(TypedDict, total=False):
    """How a change of vCPUs is carried out; ``plug``, ``unplug``, ``set_map`` and all other changes take these.

    Each may be left out. An option without a meaning for a change has no effect on it.

    Attributes:
        on_failure: What to do with the remaining steps when one fails; default ``OnFailure.STOP``.
        timeout: How long the guest may take for each answer, in seconds from QEMU's acceptance of the request; 0 only
            sends the request: a map then returns with ``TransitionOutcome.REQUESTED``, unless the next boot is to
            follow; ``unplug``, which returns what is gone, raises UnplugPendingError. Default 30.
        total_timeout: How long the steps of a whole map may take together, in seconds; None (the default): no
            limit of their own.
        revert_timeout: As *timeout*, for the steps that are undone; None (the default): the same.
        in_flight: How many commands may wait for QEMU's reply at once, at least 1; default 8. Under STOP removals are
            still requested one at a time.
        proof: ``Proof.PRESENT`` (the default) is content with QEMU's acceptance of a plug; every other rung is waited
            for, up to *timeout*. A vCPU that is not STARTED or ONLINE by then is a failure, though it stays plugged;
            ACKNOWLEDGED is advisory, so its absence is none. It is of what the change itself plugs; ONLINE is also of
            those that are plugged already and are to stay, which ``set_state``, ``set_map`` and ``set_count`` name.
        require_proof: True makes a plug that the guest does not acknowledge a failure; implies ACKNOWLEDGED.
        online: With ``Proof.ONLINE``: True (the default) has the guest agent bring a vCPU online that the guest has
            taken and left offline; False only looks.
        offline_first: True has the guest agent take a vCPU offline in the guest before QEMU is asked to remove it. If
            the guest will not, nothing is sent to QEMU, and nothing is pending; if the removal comes to nothing
            after that, the vCPU is brought online again. Needs ``attach(agent=)``.
        placement: The places of the vCPUs it plugs: a ``Placement``, which overrides that of ``attach`` and is kept
            for the VM. Or only the policy for a vCPU that cannot be in its place: ``"required"`` (the default: the
            plug is denied, or the vCPU is taken out again) or ``"preferred"`` (the plan warns, or the vCPU is kept
            and ``StepReport.unplaced`` says why).
        allow_fatal: True sends even what this QEMU is known not to survive.
        allow_boot_vcpus: True takes boot vCPUs from a VM that libvirt runs, which makes libvirtd lose the VM.
        affect: ``Affect.LIVE`` (the default) changes the running VM; CONFIG only its next boot, and nothing is sent;
            BOTH checks both sides first, changes the running VM, and writes the next boot once that is done.
    """

    on_failure: OnFailure
    timeout: float
    total_timeout: float | None
    revert_timeout: float | None
    in_flight: int
    proof: Proof
    require_proof: bool
    online: bool
    offline_first: bool
    placement: "Placement | PlacementPolicy | str | None"
    allow_fatal: bool
    allow_boot_vcpus: bool
    affect: Affect


class CheckedOptions(NamedTuple):
    """``ChangeOptions``, checked, with every default filled in."""

    on_failure: OnFailure = OnFailure.STOP
    timeout: float = 30.0
    total_timeout: float | None = None
    revert_timeout: float | None = None
    in_flight: int = 8
    proof: Proof = Proof.PRESENT
    require_proof: bool = False
    online: bool = True
    offline_first: bool = False
    placement: "Placement | None" = None
    allow_fatal: bool = False
    allow_boot_vcpus: bool = False
    affect: Affect = Affect.LIVE
    placement_policy: "PlacementPolicy | None" = None

    @classmethod
    def of(cls, options: ChangeOptions) -> "CheckedOptions":
        """Return *options*, checked.

        Raises:
            TypeError: There is no such option, or one is of a wrong type.
            ValueError: One has a wrong value.
        """
        if not options:
            return DEFAULTS
        given = values(ChangeOptions, options)
        if "placement" in given:
            given["placement"], given["placement_policy"] = read_placement(given["placement"])
        checked = cls(**given)
        at_least("in_flight", checked.in_flight, 1)
        return checked

    @property
    def awaited_proof(self) -> Proof:
        """The rung that a plug waits for."""
        return Proof.ACKNOWLEDGED if self.require_proof and self.proof is Proof.PRESENT else self.proof

    @property
    def required_proof(self) -> Proof:
        """The rung without which a plug has failed."""
        return Proof.PRESENT if self.proof is Proof.ACKNOWLEDGED and not self.require_proof else self.awaited_proof

    def requires_place(self, placement: "Placement | None") -> bool:
        """Return True if a vCPU must not stay plugged whose threads cannot be where *placement* has them."""
        policy = self.placement_policy or (None if placement is None else placement.policy)
        return policy is not None and policy.value == "required"

    def without_required_place(self) -> "CheckedOptions":
        """Return these options for vCPUs that were there before: they are better elsewhere than gone."""
        from qmpvcpu.model.placement import PlacementPolicy  # few changes have one

        return self._replace(placement_policy=PlacementPolicy.PREFERRED)

    @property
    def undo_timeout(self) -> float:
        """How long the guest may take for each answer while steps are undone, in seconds."""
        return self.timeout if self.revert_timeout is None else self.revert_timeout


DEFAULTS: Final = CheckedOptions()
"""No option given."""


def over_kept(
    given: "tuple[Placement | None, PlacementPolicy | None]", kept: "Placement | None"
) -> "Placement | None":
    """Return the placement that is *given* to ``attach``, as ``read_placement`` reads it, over the record's."""
    placement, policy = given
    if policy is None:
        return kept
    from qmpvcpu.model.placement import Placement  # few VMs have one

    return replace((placement or Placement()).over(kept or Placement()), policy=policy)


def read_placement(given: Any) -> "tuple[Placement | None, PlacementPolicy | None]":
    """Return the placement that a caller gives, None where that is only a policy, and the policy; None: nothing.

    Raises:
        TypeError: It is neither.
        ValueError: It is another word than those of ``PlacementPolicy``.
    """
    if given is None:
        return None, None
    from qmpvcpu.model.placement import Placement, PlacementPolicy  # few changes have one

    if isinstance(given, Placement):
        return given, given.policy
    words = [policy.value for policy in PlacementPolicy]
    if isinstance(given, str) and given in words:
        return None, PlacementPolicy(given)
    if isinstance(given, PlacementPolicy):
        return None, given
    kind = ValueError if isinstance(given, str) else TypeError
    raise kind(f"placement is a Placement, or one of {', '.join(words)}, not {shorten(given)}")
