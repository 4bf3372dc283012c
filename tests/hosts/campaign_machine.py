"""Campaigns beside everybody else: controllers that crash and stall, agents that die, other wishers, operators.

The store changes by compare-and-set, as the real one does. What a controller learns of it is late, twice, or out of
order; it learns all of it in the end.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qmpvcpu.hosts.campaign import (
    LAST_WORD_S,
    CampaignCore,
    Effect,
    Fence,
    ListResults,
    ReadLedger,
    ReadResult,
    SeenWish,
    Step,
    StoreResult,
    Withdraw,
    WriteWish,
)
from qmpvcpu.model.campaign import CampaignSpec, CampaignStatus, Ended, Ledger, wish_id
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Answer, Claim, Wish, WishPhase

ID = "c"
DROP_AFTER = 100.0
NO_WISH = SeenWish(0, 0.0, None, is_gone=True)


@dataclass
class Store:
    """The buckets, with all that was ever in them."""

    ledgers: list[tuple[int, Ledger]]
    revision: int = 1
    wishes: dict[str, list[SeenWish]] = field(default_factory=dict)
    states: dict[str, list[tuple[int, Answer]]] = field(default_factory=dict)
    leases: dict[str, list[tuple[int, bool]]] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)

    def next_revision(self) -> int:
        self.revision += 1
        return self.revision

    @property
    def ledger(self) -> Ledger:
        return self.ledgers[-1][1]

    def change(self, last: int, ledger: Ledger) -> bool:
        if self.ledgers[-1][0] != last:
            return False
        self.ledgers.append((self.next_revision(), ledger))
        return True

    def wish(self, key: str) -> SeenWish:
        return self.wishes.get(key, [NO_WISH])[-1]

    def write(self, key: str, last: int, now: float, wish: Wish | None) -> bool:
        if self.wish(key).revision != last:
            return False
        self.wishes.setdefault(key, []).append(SeenWish(self.next_revision(), now, wish, wish is None))
        return True

    def answer(self, key: str, answer: Answer) -> None:
        self.states.setdefault(key, []).append((self.next_revision(), answer))

    def lease(self, host: str, *, is_live: bool) -> None:
        self.leases.setdefault(host, []).append((self.next_revision(), is_live))


class Controller:
    """One that carries the campaign out, or thinks so."""

    def __init__(self, store: Store, selection: tuple[str, ...]) -> None:
        revision, ledger = store.ledgers[-1]
        self.store = store
        self.core = CampaignCore(ledger, revision, selection)
        self.core.see_results(store.ended)
        for key in selection:
            self.hear_of(key, 0)
        for host in store.leases:
            self.hear_of_host(host, 0)
        self.effects: list[Effect] = []
        self.ledger: tuple[int, Ledger] | None = None

    def hear_of(self, key: str, ago: int) -> None:
        """Learn of the wish and the state of *key* as they were *ago* changes ago."""
        wishes, states = self.store.wishes.get(key, []), self.store.states.get(key, [])
        if wishes:
            self.core.see_wish(key, wishes[max(0, len(wishes) - 1 - ago)])
        if states:
            revision, answer = states[max(0, len(states) - 1 - ago)]
            self.core.see_state(key, revision, answer, {"code": answer.code})

    def hear_of_host(self, host: str, ago: int) -> None:
        leases = self.store.leases[host]
        revision, is_live = leases[max(0, len(leases) - 1 - ago)]
        self.core.see_host(host, revision, is_live=is_live)

    def think(self, now: float) -> Step:
        step = self.core.next(now)
        self.effects = list(step.effects)
        self.ledger = None if step.ledger is None else (self.core.revision, step.ledger)
        assert self.core.ledger.status.may_begin or not any(isinstance(each, WriteWish) for each in self.effects)
        return step

    @property
    def is_busy(self) -> bool:
        return bool(self.effects) or self.ledger is not None

    def do_one(self, now: float, *, is_told: bool = True) -> None:
        """Do the next thing of the last step; unless it is told, nobody learns what came of it."""
        if self.effects:
            self.carry_out(self.effects.pop(0), now, is_told=is_told)
        elif self.ledger is not None:
            last, ledger = self.ledger
            self.ledger = None
            self.store.change(last, ledger)
            if is_told:
                self.core.see_ledger(*self.store.ledgers[-1])

    def carry_out(self, effect: Effect, now: float, *, is_told: bool) -> None:
        store = self.store
        is_prevented = False
        match effect:
            case WriteWish(key, base):
                store.write(key, base, now, store.ledger.spec.wish(ID, VmKey.parse(key)))
            case Withdraw(key, revision):
                is_prevented = store.write(key, revision, now, None)
            case Fence(key, base):
                is_prevented = store.write(key, base, now, store.wish(key).wish)
            case StoreResult(key, ended):
                store.ended.setdefault(key, ended)
        if is_told:
            self.learn(effect, is_prevented=is_prevented)

    def learn(self, effect: Effect, *, is_prevented: bool) -> None:
        match effect:
            case WriteWish(key) | Withdraw(key) | Fence(key):
                (self.core.see_prevented if is_prevented else self.core.see_wish)(key, self.store.wish(key))
            case StoreResult(key) | ReadResult(key):
                self.core.see_result(key, self.store.ended[key])
            case ListResults():
                self.core.see_results(self.store.ended)
            case ReadLedger():
                self.core.see_ledger(*self.store.ledgers[-1])


@dataclass
class Agent:
    """What one host's agent is at: it is gone when it dies, and the record of what QEMU was sent is not."""

    is_up: bool = True
    running: dict[str, Wish] = field(default_factory=dict)


class Campaigns(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.controllers: list[Controller] = []
        self.claims: Counter[str] = Counter()
        self.reached: set[str] = set()
        self.others = 0
        self.checked = 1  # how many ledgers were looked at

    @initialize(
        hosts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        at_once=st.integers(1, 6),
        per_host=st.integers(1, 3),
        stop_after=st.none() | st.integers(1, 3),
        old=st.booleans(),
        heals=st.booleans(),
    )
    def a_campaign_is_made(
        self, *, hosts: list[int], at_once: int, per_host: int, stop_after: int | None, old: bool, heals: bool
    ) -> None:
        self.heals = heals
        self.selection = tuple(f"h{host}.v{vm}" for host, count in enumerate(hosts) for vm in range(count))
        spec = CampaignSpec(
            map=VcpuMap.parse("0-3"),
            drop_after=DROP_AFTER,
            at_once=at_once,
            per_host=per_host,
            stop_after=stop_after,
        )
        self.store = Store([(1, Ledger(ID, spec, self.now, len(self.selection)))])
        self.agents = {f"h{host}": Agent() for host in range(len(hosts))}
        self.begun: set[str] = set()  # all that were ever in flight
        for host in self.agents:
            self.store.lease(host, is_live=True)
        if old:
            self.another_wishes(self.selection[0])
        self.a_controller_comes()

    # Controllers.

    def a_controller_comes(self) -> None:
        revision, ledger = self.store.ledgers[-1]
        if not ledger.is_over:
            self.store.change(revision, replace(ledger, epoch=ledger.epoch + 1))
        self.controllers.append(Controller(self.store, self.selection))

    @precondition(lambda self: len(self.controllers) < 3)
    @rule()
    def another_controller_comes(self) -> None:
        self.a_controller_comes()

    @rule(which=st.integers(0, 2))
    def a_controller_crashes(self, which: int) -> None:
        if which < len(self.controllers):
            del self.controllers[which]
        if not self.controllers:
            self.a_controller_comes()

    @rule(which=st.integers(0, 2), steps=st.integers(1, 8), is_told=st.sampled_from([True, True, True, False]))
    def a_controller_goes_on(self, which: int, steps: int, is_told: bool) -> None:
        controller = self.controllers[which % len(self.controllers)]
        for _ in range(steps):
            if not controller.is_busy:
                controller.think(self.now)
            if not controller.is_busy:
                break
            controller.do_one(self.now, is_told=is_told)
            self.bounds_hold()

    @rule(which=st.integers(0, 2), rounds=st.integers(1, 3))
    def all_goes_well_for_a_while(self, which: int, rounds: int) -> None:
        for _ in range(rounds):
            self.a_controller_hears_of_all(which, 0)
            self.a_controller_goes_on(which, 20, is_told=True)
            self.every_agent_claims(0)
            self.every_agent_is_done(0)

    @rule(which=st.integers(0, 2), data=st.data(), ago=st.integers(0, 2))
    def a_controller_hears(self, which: int, data: Any, ago: int) -> None:
        controller = self.controllers[which % len(self.controllers)]
        controller.hear_of(data.draw(st.sampled_from(self.selection)), ago)

    @rule(which=st.integers(0, 2), ago=st.integers(0, 2))
    def a_controller_hears_of_all(self, which: int, ago: int) -> None:
        controller = self.controllers[which % len(self.controllers)]
        for key in self.selection:
            controller.hear_of(key, ago)
        for host in self.agents:
            controller.hear_of_host(host, ago)
        controller.core.see_ledger(*self.store.ledgers[max(0, len(self.store.ledgers) - 1 - ago)])

    # Hosts.

    @rule(host=st.integers(0, 3))
    def a_host_dies(self, host: int) -> None:
        agent = self.agents.get(f"h{host}")
        if agent is not None and agent.is_up:
            agent.is_up = False
            self.store.lease(f"h{host}", is_live=False)

    @rule(host=st.integers(0, 3))
    def a_host_is_only_cut_off(self, host: int) -> None:
        if f"h{host}" in self.agents:
            self.store.lease(f"h{host}", is_live=False)

    @rule(host=st.integers(0, 3))
    def a_host_comes_back(self, host: int) -> None:
        agent = self.agents.get(f"h{host}")
        if agent is not None:
            agent.is_up = True
            self.store.lease(f"h{host}", is_live=True)

    @rule(data=st.data(), skew=st.integers(-5, 5))
    def an_agent_claims(self, data: Any, skew: int) -> None:
        self.claim(data.draw(st.sampled_from(self.selection)), self.now + skew)

    @rule(skew=st.integers(-5, 5))
    def every_agent_claims(self, skew: int) -> None:
        for key in self.selection:
            self.claim(key, self.now + skew)

    def claim(self, key: str, now: float) -> None:
        agent, seen = self.agents[key.split(".", maxsplit=1)[0]], self.store.wish(key)
        if not agent.is_up or seen.wish is None:
            return
        if seen.wish.claim is not None:
            self.take_up_again(key, agent, seen.wish)
            return
        if now > seen.created + seen.wish.drop_after:
            self.store.answer(key, Answer(seen.revision, seen.wish.id, WishPhase.EXPIRED, 1))
            self.store.write(key, seen.revision, self.now, None)
            return
        if key in agent.running and agent.running[key].id != seen.wish.id:
            self.stop(key, agent)
        claimed = replace(seen.wish, claim=Claim(seen.revision, seen.created, "agent", 0))
        assert self.store.write(key, seen.revision, self.now, claimed)
        agent.running[key] = claimed
        if claimed.campaign:
            self.claims[key] += 1
            assert self.claims[key] == 1, f"{key} was begun twice"

    def take_up_again(self, key: str, agent: Agent, wish: Wish) -> None:
        """Take up the wish that this agent, or the one before it, has claimed."""
        if not self.is_answered(key, wish):
            agent.running[key] = wish

    def is_answered(self, key: str, wish: Wish) -> bool:
        return any(answer.id == wish.id and answer.phase.is_over for _, answer in self.store.states.get(key, ()))

    def stop(self, key: str, agent: Agent) -> None:
        """Another wish has come: the running one ends at its safe point; what came of it is in the stream only."""
        agent.running.pop(key)

    @rule()
    def every_agent_says_what_it_is_at(self) -> None:
        for key in self.selection:
            seen = self.store.wish(key)
            agent = self.agents[key.split(".")[0]]
            if agent.is_up and key in agent.running and seen.wish is not None and seen.wish.claim is None:
                self.store.answer(key, Answer(seen.revision, seen.wish.id, WishPhase.WAITING))
        for agent in self.agents.values():
            for key, wish in agent.running.items():
                assert wish.claim is not None
                if agent.is_up and not self.is_answered(key, wish):
                    self.store.answer(key, Answer(wish.claim.revision, wish.id, WishPhase.RUNNING))

    @rule(data=st.data(), code=st.sampled_from([0, 0, 0, 1]))
    def an_agent_is_done(self, data: Any, code: int) -> None:
        self.finish(data.draw(st.sampled_from(self.selection)), code)

    @rule(code=st.sampled_from([0, 0, 1]))
    def every_agent_is_done(self, code: int) -> None:
        self.every_agent_says_what_it_is_at()
        for key in self.selection:
            self.finish(key, code)

    def finish(self, key: str, code: int) -> None:
        agent = self.agents[key.split(".", maxsplit=1)[0]]
        wish = agent.running.get(key)
        if not agent.is_up or wish is None:
            return
        del agent.running[key]
        assert wish.claim is not None
        self.store.answer(key, Answer(wish.claim.revision, wish.id, WishPhase.ENDED, code))
        if wish.campaign and code == 0:
            self.reached.add(key)

    # Others.

    @rule(data=st.data())
    def somebody_else_wishes(self, data: Any) -> None:
        self.another_wishes(data.draw(st.sampled_from(self.selection)))

    def another_wishes(self, key: str) -> None:
        self.others += 1
        self.store.write(
            key,
            self.store.wish(key).revision,
            self.now,
            Wish(f"other{self.others}", count=1, drop_after=DROP_AFTER),
        )

    @rule(data=st.data())
    def somebody_withdraws_a_wish(self, data: Any) -> None:
        key = data.draw(st.sampled_from(self.selection))
        seen = self.store.wish(key)
        if seen.wish is not None and seen.wish.claim is None:
            self.store.write(key, seen.revision, self.now, None)

    @rule(data=st.data())
    def somebody_stops_a_wish_that_was_begun(self, data: Any) -> None:
        key = data.draw(st.sampled_from(self.selection))
        seen = self.store.wish(key)
        if seen.wish is not None and seen.wish.claim is not None:
            self.store.write(key, seen.revision, self.now, None)

    @rule()
    def every_agent_stops_what_was_deleted(self) -> None:
        for agent in self.agents.values():
            for key, wish in list(agent.running.items()):
                if agent.is_up and self.store.wish(key).is_gone and wish.claim is not None:
                    del agent.running[key]
                    self.store.answer(key, Answer(wish.claim.revision, wish.id, WishPhase.WITHDRAWN, 0))

    @rule(what=st.sampled_from([Ledger.paused, Ledger.resumed, Ledger.resumed, Ledger.stopped]))
    def an_operator_decides(self, what: Any) -> None:
        revision, ledger = self.store.ledgers[-1]
        if ledger.status.may_go_on:
            self.store.change(revision, what(ledger))

    @rule(seconds=st.sampled_from([1.0, 10.0, DROP_AFTER + 6, DROP_AFTER + LAST_WORD_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for agent in self.agents.values():
            for key, wish in list(agent.running.items()):
                assert wish.claim is not None
                # Whatever an agent does, dead or cut off or not, it sends nothing once the time is over.
                if self.now >= wish.claim.written + wish.drop_after + LAST_WORD_S:
                    if agent.is_up:
                        self.finish(key, 1)
                    agent.running.pop(key, None)

    # What must hold.

    def is_begun(self, key: str) -> bool:
        """Whether something may be sent for the campaign's wish of *key*, now or once an agent sees it."""
        seen = self.store.wish(key)
        if any(key in agent.running and agent.running[key].campaign for agent in self.agents.values()):
            return True
        if seen.wish is None or seen.wish.id != wish_id(ID, key) or self.is_answered(key, seen.wish):
            return False
        if seen.wish.claim is None:
            return self.now <= seen.created + DROP_AFTER
        return self.now <= seen.wish.claim.written + DROP_AFTER

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "store"):
            return
        ledger = self.store.ledger
        spec = ledger.spec
        begun = {key for key in self.selection if self.is_begun(key)}
        assert begun <= ledger.in_flight.keys()
        assert len(ledger.in_flight) <= spec.at_once
        for of_host in Counter(key.split(".")[0] for key in ledger.in_flight).values():
            assert of_host <= spec.per_host

    @invariant()
    def history_is_sound(self) -> None:
        if not hasattr(self, "store"):
            return
        while len(self.store.ledgers) > self.checked:
            before, (_, ledger) = self.store.ledgers[self.checked - 1][1], self.store.ledgers[self.checked]
            new = ledger.in_flight.keys() - before.in_flight.keys()
            assert not new & self.begun, "begun again"
            if new:
                assert before.status is ledger.status is CampaignStatus.RUNNING
                assert ledger.spec.stop_after is None or ledger.failed < ledger.spec.stop_after
            assert ledger.ended - before.ended == len(before.in_flight.keys() - ledger.in_flight.keys())
            self.begun |= new
            self.checked += 1
        last = self.store.ledger
        assert self.store.ended.keys() <= self.begun
        left = {key: ended for key, ended in self.store.ended.items() if key not in last.in_flight}
        assert len(left) == last.ended
        assert sum(ended.has_failed for ended in left.values()) == last.failed
        assert sum(ended.phase is WishPhase.WITHDRAWN for ended in left.values()) == last.withdrawn

    @invariant()
    def results_are_true(self) -> None:
        if not hasattr(self, "store"):
            return
        for key, ended in self.store.ended.items():
            if ended.code == 0:
                assert key in self.reached
            if ended.phase is WishPhase.EXPIRED or (ended.phase is WishPhase.WITHDRAWN and not ended.state):
                assert not self.claims[key]

    def teardown(self) -> None:
        """However it came here: any one controller that is left alone brings it to its end."""
        if not hasattr(self, "store"):
            return
        revision, ledger = self.store.ledgers[-1]
        if ledger.status is CampaignStatus.PAUSED:
            self.store.change(revision, ledger.resumed())
        if self.heals:
            for host in self.agents:
                self.a_host_comes_back(int(host[1:]))
        for _ in range(40 * len(self.selection) + 40):
            if not self.store.ledger.is_over:
                self.one_goes_on_alone(self.controllers[0])
        self.history_is_sound()
        self.results_are_true()
        ledger = self.store.ledger
        assert ledger.is_over, f"it never ends: {ledger}"
        if ledger.status is CampaignStatus.DONE:
            assert self.store.ended.keys() == set(self.selection)

    def one_goes_on_alone(self, controller: Controller) -> None:
        self.a_controller_hears_of_all(0, 0)
        step = controller.think(self.now)
        is_idle = not controller.is_busy
        while controller.is_busy:
            controller.do_one(self.now)
            self.bounds_hold()
        for key in self.selection:
            self.claim(key, self.now)
            self.finish(key, 0)
        if is_idle:
            self.time_passes(max(0.0, min(step.wake_at, self.now + DROP_AFTER + LAST_WORD_S) - self.now))
