"""Names on the NATS server of many hosts: buckets and their keys, the stream of events, and subjects.

::

    bucket qmpvcpu_wishes      HOST.VM           what a VM is to have            (Wish)
    bucket qmpvcpu_states      HOST.VM           what it has, and its answer     (a document of ``fleet list --json``)
    bucket qmpvcpu_leases      host.HOST         the agent that runs there       (HostInfo); gone if not renewed
                               campaign.ID       who carries a campaign out; gone if not renewed
    bucket qmpvcpu_campaigns   ID, ID.*          campaigns
    stream qmpvcpu_events      qmpvcpu.event.HOST.VM.KIND
    request                    qmpvcpu.do.HOST.OPERATION.WHO
    what is for one user       _INBOX.host.HOST.*, _INBOX.who.WHO.*

HOST, VM and WHO are one token each: see ``token``.
"""

import enum
import re
from dataclasses import dataclass, replace
from typing import Final

from qmpvcpu.model.codec import SCHEMA, from_json

WISHES: Final = "qmpvcpu_wishes"
STATES: Final = "qmpvcpu_states"
LEASES: Final = "qmpvcpu_leases"
CAMPAIGNS: Final = "qmpvcpu_campaigns"
EVENTS: Final = "qmpvcpu_events"

MOST_BYTES: Final = 64 * 1024
"""The longest wish or request that is read; longer ones are answered, unread."""

_RAW: Final = "surrogateescape"
_SPECIAL: Final = re.compile(r"[^A-Za-z0-9_-]")
_ESCAPE: Final = re.compile(r"=([0-9A-F]{2})")
_TOKEN: Final = re.compile(r"(?:[A-Za-z0-9_-]|=[0-9A-F]{2})+")


class Operation(enum.Enum):
    """What an agent can be asked for; the last token but one of the request's subject."""

    LIST = "list"
    PLAN = "plan"
    STATISTICS = "statistics"
    SET = "set"
    COUNT = "count"
    PLUG = "plug"
    UNPLUG = "unplug"
    CANCEL = "cancel"
    RECOVER = "recover"

    @property
    def only_reads(self) -> bool:
        """True if it changes nothing."""
        return self in (Operation.LIST, Operation.PLAN, Operation.STATISTICS)


def token(name: str) -> str:
    """Return *name* as one token of a subject or key: what is no letter, digit, ``_`` or ``-`` becomes ``=XX``.

    XX are the bytes of its UTF-8, in hexadecimal: ``web.1`` is ``web=2E1``. Two names never have one token.

    Raises:
        ValueError: It is empty.
    """
    if not name:
        raise ValueError("a name is empty")
    return _SPECIAL.sub(lambda found: "".join(f"={byte:02X}" for byte in found[0].encode("utf-8", _RAW)), name)


def name_of(text: str) -> str:
    """Return the name whose token *text* is.

    Raises:
        ValueError: It is no token.
    """
    if not _TOKEN.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is no token")
    raw = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
    return raw.encode("latin-1").decode("utf-8", _RAW)


@dataclass(frozen=True, order=True)
class VmKey:
    """Which VM: its host's name, and its own."""

    host: str
    vm: str

    @property
    def key(self) -> str:
        """Its key in the buckets of wishes and states."""
        return f"{token(self.host)}.{token(self.vm)}"

    @classmethod
    def parse(cls, key: str) -> "VmKey":
        """Return which VM has *key*.

        Raises:
            ValueError: It is no VM's key.
        """
        host, _, vm = key.partition(".")
        return cls(name_of(host), name_of(vm))

    def __str__(self) -> str:
        return f"{self.host}/{self.vm}"


def request_subject(host: str, operation: Operation, who: str) -> str:
    """Return the subject of a request to *host*'s agent; *who* asks."""
    return f"qmpvcpu.do.{token(host)}.{operation.value}.{token(who)}"


def request_subjects(host: str, operation: Operation) -> str:
    """Return the subject of all such requests, whoever asks."""
    return f"qmpvcpu.do.{token(host)}.{operation.value}.*"


def host_inbox(host: str) -> str:
    """Return the subject below which everything arrives that is for *host*'s agent."""
    return f"_INBOX.host.{token(host)}"


def client_inbox(who: str) -> str:
    """Return the subject below which everything arrives that is for *who*."""
    return f"_INBOX.who.{token(who)}"


def event_subject(vm: VmKey, kind: str) -> str:
    """Return the subject under which it is told that *kind* happened to *vm*."""
    return f"qmpvcpu.event.{vm.key}.{kind}"


HOST_LEASES: Final = "host.*"
"""The leases of all hosts, as a filter of keys."""


def host_lease_key(host: str) -> str:
    """Return the key of the lease of *host*'s agent."""
    return f"host.{token(host)}"


@dataclass(frozen=True)
class HostInfo:
    """What an agent says about itself: the value of its host's lease.

    Attributes:
        host: The host's name.
        agent: This run of the agent.
        version: Of qmpvcpu.
        operations: What it may do, in the words of Operation; an agent of a later version may have more.
        since: When it began, in seconds since 1970 by the server's clock.
        vms: How many VMs it has.
        schema: The format.
    """

    host: str
    agent: str
    version: str
    operations: tuple[str, ...]
    since: float
    vms: int
    schema: str = SCHEMA

    @classmethod
    def read(cls, key: str, content: bytes) -> "HostInfo":
        """Return what the agent says whose lease has *key*; the key says which host, as the server vouches for it.

        Raises:
            ValueError: It is no host's lease.
        """
        return replace(from_json(cls, content), host=name_of(key.partition(".")[2]))
