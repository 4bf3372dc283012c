"""What to do next for a campaign, from what is known of it: pure, without I/O and without a clock.

Several programs may carry one campaign out, each with knowledge that may be old, stop at any point, and go on later.
These rules keep the bounds at every instant; all of them rest on compare-and-set:

1. A VM enters the ledger's ``in_flight`` once, together with the revision of its wish's key, its *base*.
2. Its wish is written only as the direct successor of that base. So it is written once, and never once something else
   has been written there.
3. Its result is written (created, so the first one stays) only when nothing more can come of its wish: its host says
   so; the key has moved past the base without a claim of this wish; or its time is over.
4. It leaves ``in_flight`` only when its result is there. What it counts as is read from the result that is there.
5. A VM is put into ``in_flight`` only by someone who knows all results that the ledger counts: none is begun again.

Agents keep their part: a wish is claimed by compare-and-set before anything is sent for it, nothing is sent for it
once its time is over, and another wish is begun only when nothing more is sent for the one before it.

::

    waiting ─ledger→ in flight ─write→ written ─claim→ claimed ─answer, or its time is over→ result ─ledger→ ended
                         │                └─withdraw (its time is over, or the campaign is stopped)─→ result
                         └─fence (the campaign is stopped)─→ result
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any, Final, NamedTuple

from qmpvcpu.model.campaign import Ended, Ledger, wish_id
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.wish import GRACE_S, Answer, Wish, WishPhase

LAST_WORD_S: Final = 2 * GRACE_S
"""How long after a wish's time is over its host's answer is awaited, in seconds.

A host may take ``GRACE_S`` to come to a safe point; the rest is for its clock, and for what is on its way.
"""

_MOST_BYTES_IN_FLIGHT: Final = 40_000  # so that the ledger stays below 64 KiB
_BYTES_EACH: Final = 24


class SeenWish(NamedTuple):
    """What a VM's key in the bucket of wishes holds, as last seen.

    Attributes:
        revision: Its revision; 0: nothing was ever there.
        created: When that was written, by the server's clock.
        wish: The wish; None: there is none, or it cannot be read.
        is_gone: True if there is nothing, or it was deleted.
    """

    revision: int
    created: float
    wish: Wish | None
    is_gone: bool

    @property
    def wish_revision(self) -> int:
        """The revision by which an answer names the wish."""
        claim = self.wish.claim if self.wish is not None else None
        return self.revision if claim is None else claim.revision


class _OurAnswer(NamedTuple):
    revision: int  # of the state
    answer: Answer
    document: Mapping[str, Any]


_NO_WISH: Final = SeenWish(0, 0.0, None, is_gone=True)


@dataclass(frozen=True)
class WriteWish:
    """Write the VM's wish as the successor of revision *base*, if that is still the last."""

    key: str
    base: int


@dataclass(frozen=True)
class Withdraw:
    """Delete the VM's wish if *revision* is still the last, so that no host has begun it."""

    key: str
    revision: int


@dataclass(frozen=True)
class Fence:
    """Make sure that the VM's wish is never written as the successor of revision *base*.

    Write what is there again, or its deletion, as the successor of *base* if that is still the last.
    """

    key: str
    base: int


@dataclass(frozen=True)
class StoreResult:
    """Write the VM's result unless there is one."""

    key: str
    ended: Ended


@dataclass(frozen=True)
class ReadResult:
    """Read the VM's result."""

    key: str


@dataclass(frozen=True)
class ListResults:
    """Find out again which VMs have results."""


@dataclass(frozen=True)
class ReadLedger:
    """Read the ledger again."""


Effect = WriteWish | Withdraw | Fence | StoreResult | ReadResult | ListResults | ReadLedger


@dataclass(frozen=True)
class Step:
    """What to do next.

    Attributes:
        effects: What is done first, in any order, or all at once.
        ledger: What the ledger is to become after that; None: it stays.
        wake_at: When to ask again if there is no news, by the server's clock; infinity: not before.
    """

    effects: tuple[Effect, ...]
    ledger: Ledger | None
    wake_at: float


@dataclass(frozen=True)
class _Rebase:
    base: int


class _Leaves:
    """Its result is there."""


_LEAVES: Final = _Leaves()
_Verdict = Effect | _Rebase | _Leaves | float  # a number: nothing before that time, unless there is news


class CampaignCore:
    """One campaign, as one controller knows it.

    News come in by ``see_...``, in any order, late, or twice: what is older than what is known is passed over. Ask
    ``next`` what to do; do it, say what came of it by ``see_...``, and ask again. What could not be done is asked for
    again.

    Args:
        selection: All its VMs, by their keys, in the order in which they are begun.
    """

    def __init__(self, ledger: Ledger, revision: int, selection: Iterable[str]) -> None:
        self._revision = revision
        self._ledger = ledger
        self._waiting: dict[str, deque[str]] = {}  # by host
        self._vms: set[str] = set()
        self._picked: tuple[str, ...] = ()  # taken out of waiting by the step that was returned last
        # Hosts that may have room, by is_live, each with how many of its VMs had their turn, and its place.
        self._queues: dict[bool, list[tuple[int, int, str]]] = {True: [], False: []}
        self._queued: dict[str, bool] = {}
        self._turns: Counter[str] = Counter()
        self._flying: Counter[str] = Counter()
        self._wishes: dict[str, SeenWish] = {}
        self._answers: dict[str, tuple[int, Answer | None]] = {}  # with the revision of the state
        self._ours: dict[str, _OurAnswer] = {}  # the newest to the campaign's own wish
        self._hosts: dict[str, tuple[int, bool]] = {}
        self._given_up: set[str] = set()  # hosts that have let a wish expire, and have not come back
        self._ended: set[str] = set()
        self._results: dict[str, Ended] = {}
        self._prevented: set[str] = set()
        self._undecided: set[str] = set()
        self._due: dict[str, float] = {}
        for key in selection:
            self._vms.add(key)
            self._waiting.setdefault(_host(key), deque()).append(key)
        self._places = {host: place for place, host in enumerate(self._waiting)}
        for host in self._waiting:
            self._queue(host)
        self._take({})

    def __contains__(self, key: object) -> bool:
        return key in self._vms

    @property
    def ledger(self) -> Ledger:
        """The ledger as last seen."""
        return self._ledger

    @property
    def revision(self) -> int:
        """The revision of the ledger as last seen."""
        return self._revision

    # News.

    def see_ledger(self, revision: int, ledger: Ledger) -> None:
        """Take note of the ledger: what was read, or what was written by us."""
        if revision > self._revision:
            before, self._revision, self._ledger = self._ledger, revision, ledger
            self._take(before.in_flight)
            if ledger.status is not before.status:
                self._undecided.update(ledger.in_flight)

    def see_wish(self, key: str, seen: SeenWish) -> None:
        """Take note of what a key of the bucket of wishes holds; for one of another VM, nothing happens."""
        if key in self._vms and seen.revision >= self._wishes.get(key, _NO_WISH).revision:
            self._wishes[key] = seen
            self._undecided.add(key)

    def see_prevented(self, key: str, seen: SeenWish) -> None:
        """Take note that ``Withdraw`` or ``Fence`` was done, by us for sure, and of what the key holds now.

        So the wish was not begun, and never will be. Nobody else can tell: where a wish was deleted, another may have
        come in between, and this one may have been claimed before that.
        """
        self._prevented.add(key)
        self.see_wish(key, seen)

    def see_state(self, key: str, revision: int, answer: Answer | None, document: Mapping[str, Any]) -> None:
        """Take note of a VM's state; for another VM, nothing happens."""
        if key not in self._vms:
            return
        self._undecided.add(key)
        if revision > self._answers.get(key, (-1, None))[0]:
            self._answers[key] = revision, answer
        if answer is not None and answer.id == wish_id(self._ledger.id, key):
            known = self._ours.get(key)
            if known is None or revision > known.revision:
                self._ours[key] = _OurAnswer(revision, answer, document)

    def see_host(self, host: str, revision: int, *, is_live: bool) -> None:
        """Take note of a host's lease; *host* is its name as one token. One that ran out keeps its last revision."""
        known, was_live = self._hosts.get(host, (-1, False))
        if revision < known or (revision == known and is_live):
            return
        self._hosts[host] = (revision, is_live)
        if is_live is was_live:
            return
        if is_live:
            self._given_up.discard(host)
        self._queue(host)
        self._undecided.update(key for key in self._ledger.in_flight if _host(key) == host)

    def see_result(self, key: str, ended: Ended) -> None:
        """Take note of the result that is there, whoever wrote it."""
        if key in self._vms:
            self._ended.add(key)
            self._results[key] = ended
            self._undecided.add(key)
            if ended.phase is WishPhase.EXPIRED and not self._is_live(_host(key)):
                self._given_up.add(_host(key))

    def see_results(self, keys: Iterable[str]) -> None:
        """Take note of which VMs have results."""
        new = self._vms.intersection(keys) - self._ended
        self._ended |= new
        self._undecided |= new

    # Decisions.

    def next(self, now: float) -> Step:
        """Return what to do, at *now* by the server's clock."""
        before = self._ledger
        self._put_back(self._picked)  # what was to be begun by the last step, and was not
        if before.is_over:
            return Step((), None, math.inf)
        effects: list[Effect] = []
        in_flight = dict(before.in_flight)
        left: list[Ended] = []
        due = [key for key, at in self._due.items() if at <= now]
        undecided = [key for key in (*self._undecided, *due) if key in in_flight]
        self._undecided.clear()
        for key in dict.fromkeys(undecided):
            verdict = self._judge(key, in_flight[key], now)
            self._due.pop(key, None)
            if isinstance(verdict, float):
                self._due[key] = verdict
                continue
            self._undecided.add(key)  # until news of what came of it
            if isinstance(verdict, _Rebase):
                in_flight[key] = verdict.base
            elif isinstance(verdict, _Leaves):
                del in_flight[key]
                left.append(self._results[key])
            else:
                effects.append(verdict)
        after = replace(
            before,
            in_flight=in_flight,
            ended=before.ended + len(left),
            failed=before.failed + sum(ended.has_failed for ended in left),
            withdrawn=before.withdrawn + sum(ended.phase is WishPhase.WITHDRAWN for ended in left),
        ).settled()
        if after.status.may_begin and after.waiting:
            unknown = self._what_is_unknown()
            if unknown is None:
                self._pick(in_flight)
            else:
                effects.append(unknown)
        wake_at = min(self._due.values(), default=math.inf)
        return Step(tuple(effects), None if after == before else after, wake_at)

    def _judge(self, key: str, base: int, now: float) -> _Verdict:
        """Decide what is next for a VM in flight."""
        if key in self._ended:
            return _LEAVES if key in self._results else ReadResult(key)
        ours = self._ours.get(key)
        if ours is not None and ours.answer.phase.is_over:
            answer = ours.answer
            code = answer.code if answer.phase is WishPhase.ENDED else answer.code or 1
            return self._result(key, answer.phase, code, answer.why, now=now, state=ours.document)
        if key in self._prevented:
            return self._withdrawn(key, now)
        return self._judge_key(key, base, self._wishes.get(key, _NO_WISH), now)

    def _judge_key(self, key: str, base: int, seen: SeenWish, now: float) -> _Verdict:
        """Decide by what the key of its wish holds."""
        if seen.revision < base:
            return math.inf  # whoever put it in flight has seen more
        if seen.revision == base:
            return self._judge_unwritten(key, seen, now)
        if seen.wish is not None and seen.wish.id == wish_id(self._ledger.id, key):
            return self._judge_written(key, seen, seen.wish, now)
        if seen.wish is not None and seen.wish.claim is not None and seen.wish.claim.revision <= base:
            # The base was claimed meanwhile: what is there now has taken its place, and nothing between the two.
            return _Rebase(seen.revision) if self._ledger.status.may_go_on else self._withdrawn(key, now)
        return self._judge_replaced(key, seen, now)

    def _judge_unwritten(self, key: str, seen: SeenWish, now: float) -> _Verdict:
        status = self._ledger.status
        if status.may_begin:
            return WriteWish(key, seen.revision)
        if status.may_go_on:
            return math.inf
        wish = seen.wish
        if wish is not None and wish.claim is None and now < seen.created + wish.drop_after:
            return seen.created + wish.drop_after  # another's wish that waits: its host claims it before that
        return Fence(key, seen.revision)

    def _judge_written(self, key: str, seen: SeenWish, wish: Wish, now: float) -> _Verdict:
        host = _host(key)
        if wish.claim is None:
            ends = seen.created + wish.drop_after
            is_over = now >= ends or host in self._given_up or not self._ledger.status.may_go_on
            return Withdraw(key, seen.revision) if is_over else ends
        ends = wish.claim.written + wish.drop_after + LAST_WORD_S
        if now < ends:
            return ends
        if key in self._ours and self._is_live(host):
            return math.inf  # a host that is there says how it ends
        why = "its host began it, and has not said how it ended"
        return self._result(key, WishPhase.RUNNING, 3, why, now=now)

    def _judge_replaced(self, key: str, seen: SeenWish, now: float) -> _Verdict:
        """Another wish came after it, or in its place, or its deletion."""
        last_moment = seen.created + self._ledger.spec.drop_after + LAST_WORD_S  # it was written before what is there
        answer = self._answers.get(key, (-1, None))[1]
        past = answer is not None and answer.revision >= seen.wish_revision and answer.phase is not WishPhase.WAITING
        if not past and now < last_moment:
            return last_moment
        if seen.is_gone:
            why = "its wish was deleted, and its host has not said what came of it"
            return self._result(key, WishPhase.RUNNING, 3, why, now=now)
        whose = (
            "one that cannot be read" if seen.wish is None else f"{seen.wish.id[:100]!r} of {seen.wish.who[:100]!r}"
        )
        return self._result(key, WishPhase.SUPERSEDED, 1, f"the newer one is {whose}", now=now)

    def _withdrawn(self, key: str, now: float) -> StoreResult:
        """It was not begun, and never will be."""
        if not self._ledger.status.may_go_on:
            return self._result(key, WishPhase.WITHDRAWN, 1, "the campaign was stopped before it was begun", now=now)
        return self._result(key, WishPhase.EXPIRED, 3, "no agent of its host has begun it in time", now=now)

    def _result(
        self, key: str, phase: WishPhase, code: int, why: str, *, now: float, state: Mapping[str, Any] | None = None
    ) -> StoreResult:
        vm = VmKey.parse(key)
        return StoreResult(key, Ended(vm.host, vm.vm, phase, code, why, now, state or {}))

    def _is_live(self, host: str) -> bool:
        return self._hosts.get(host, (-1, False))[1]

    # Beginning.

    def _what_is_unknown(self) -> Effect | None:
        """Return how to find out what must be known before a VM is begun; None: all of it is known.

        The ledger counts the results of all VMs that have left it. With fewer, one that has ended would seem to wait.
        """
        known = len(self._ended) - sum(key in self._ended for key in self._ledger.in_flight)
        if known == self._ledger.ended:
            return None
        return ListResults() if known < self._ledger.ended else ReadLedger()

    def _pick(self, in_flight: dict[str, int]) -> None:
        """Put waiting VMs into *in_flight*, as many as the bounds allow, hosts in turn, and silent ones last."""
        spec = self._ledger.spec
        room = spec.at_once - len(in_flight)
        bytes_left = _MOST_BYTES_IN_FLIGHT - sum(len(key) + _BYTES_EACH for key in in_flight)
        flying = Counter(map(_host, in_flight))
        for each, count in self._flying.items():
            if flying[each] < count:
                self._queue(each)
        self._flying = flying
        picked: list[str] = []
        while room > len(picked) and (host := self._next_host(in_flight)) is not None:
            if not self._has_waiting(host, in_flight) or flying[host] >= spec.per_host:
                continue  # it comes back when one of its VMs has left
            bytes_left -= len(self._waiting[host][0]) + _BYTES_EACH
            if bytes_left < 0 and in_flight:
                self._queue(host)
                break
            key = self._waiting[host].popleft()
            in_flight[key] = self._wishes.get(key, _NO_WISH).revision
            flying[host] += 1
            self._turns[host] += 1
            picked.append(key)
            self._queue(host)
        self._picked = tuple(picked)

    def _next_host(self, in_flight: Mapping[str, int]) -> str | None:
        """Return a host that may have room; a silent one only when no VM waits on any other."""
        for is_live in (True, False):
            queue = self._queues[is_live]
            if not is_live and any(
                self._is_live(host) and self._has_waiting(host, in_flight) for host in self._flying
            ):
                break
            while queue:
                _, _, host = heappop(queue)
                if self._queued.get(host) is is_live:
                    del self._queued[host]
                    return host
        return None

    def _has_waiting(self, host: str, in_flight: Mapping[str, int]) -> bool:
        waiting = self._waiting.get(host)
        while waiting and (waiting[0] in self._ended or waiting[0] in in_flight):
            waiting.popleft()
        return bool(waiting)

    def _put_back(self, keys: Iterable[str]) -> None:
        """Have those that are not in flight wait, except for those that have ended, as far as is known."""
        for key in keys:
            if key not in self._ledger.in_flight and key not in self._ended:
                self._waiting[_host(key)].appendleft(key)
                self._queue(_host(key))
        self._picked = ()

    def _queue(self, host: str) -> None:
        """Have *host* looked at when there is room, if it has VMs that wait."""
        is_live = self._is_live(host)
        if self._waiting.get(host) and self._queued.get(host) is not is_live:
            self._queued[host] = is_live
            heappush(self._queues[is_live], (self._turns[host], self._places[host], host))

    def _take(self, before: Mapping[str, int]) -> None:
        """Take over what the ledger has in flight now, where it had *before*."""
        new = self._ledger.in_flight
        self._put_back((*before, *self._picked))
        for key in before.keys() - new.keys():
            for known in (self._due, self._results, self._ours, self._answers):
                known.pop(key, None)
        self._undecided.update(key for key, base in new.items() if before.get(key) != base)
        flying = Counter(map(_host, new))
        for host in self._flying.keys() | flying.keys():
            self._queue(host)
        self._flying = flying


def _host(key: str) -> str:
    return key.partition(".")[0]
