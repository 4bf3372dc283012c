"""What is next for a campaign: who is begun first, what a silent host costs, how much is thought about."""

import json
import math
from collections import Counter
from dataclasses import replace

from qmpvcpu.hosts.campaign import LAST_WORD_S, CampaignCore, Fence, SeenWish, StoreResult, Withdraw, WriteWish
from qmpvcpu.model.campaign import CampaignSpec, CampaignStatus, Ledger, wish_id
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.wish import Answer, Claim, WishPhase

SPEC = CampaignSpec(count=2, at_once=4, per_host=2, drop_after=100, stop_after=None)
NOW = 1000.0


class Campaign:
    """A campaign with one controller, and the store in two variables."""

    def __init__(self, spec: CampaignSpec, selection: list[str], live: tuple[str, ...] = ()) -> None:
        self.spec = spec
        self.revision = 10
        self.core = CampaignCore(Ledger("c", spec, 1.0, len(selection)), self.revision, selection)
        for host in live:
            self.core.see_host(host, 1, is_live=True)

    def next_revision(self) -> int:
        self.revision += 1
        return self.revision

    def begins(self, now: float = NOW) -> list[str]:
        """Return what is begun next, which is then in flight."""
        before = self.core.ledger
        step = self.core.next(now)
        if step.ledger is None:
            return []
        self.core.see_ledger(self.next_revision(), step.ledger)
        return [key for key in step.ledger.in_flight if key not in before.in_flight]

    def effects(self, now: float = NOW) -> list[object]:
        return list(self.core.next(now).effects)

    def write(self, key: str, now: float = NOW) -> int:
        revision = self.next_revision()
        wish = self.spec.wish("c", VmKey.parse(key))
        self.core.see_wish(key, SeenWish(revision, now, wish, is_gone=False))
        return revision

    def claim(self, key: str, now: float = NOW) -> None:
        claim = Claim(self.write(key, now), now, "agent", 0)
        wish = replace(self.spec.wish("c", VmKey.parse(key)), claim=claim)
        self.core.see_wish(key, SeenWish(self.next_revision(), now, wish, is_gone=False))

    def answer(self, key: str, phase: WishPhase = WishPhase.ENDED, code: int = 0) -> None:
        answer = Answer(1, wish_id("c", key), phase, code)
        self.core.see_state(key, self.next_revision(), answer, {"name": key})

    def ends(self, key: str) -> None:
        """The host says that the VM is done, and its result is stored."""
        self.answer(key)
        self.store_results()

    def store_results(self, now: float = NOW) -> list[StoreResult]:
        found = [each for each in self.effects(now) if isinstance(each, StoreResult)]
        for each in found:
            self.core.see_result(each.key, each.ended)
        return found


def test_hosts_come_in_turn_and_silent_ones_last() -> None:
    vms = ["dead.1", "a.1", "a.2", "a.3", "b.1", "b.2", "b.3"]
    campaign = Campaign(SPEC, vms, live=("a", "b"))
    assert campaign.begins() == ["a.1", "b.1", "a.2", "b.2"]
    campaign.ends("a.1")
    assert campaign.begins() == ["a.3"]
    campaign.ends("b.2")
    assert campaign.begins() == ["b.3"]
    campaign.ends("b.1")
    assert campaign.begins() == ["dead.1"]


def test_a_silent_host_is_not_begun_while_vms_of_others_wait_for_their_turn() -> None:
    campaign = Campaign(replace(SPEC, per_host=1), ["dead.1", "a.1", "a.2"], live=("a",))
    assert campaign.begins() == ["a.1"]
    assert campaign.begins() == []
    campaign.ends("a.1")
    assert campaign.begins() == ["a.2", "dead.1"]


def test_a_host_that_comes_back_is_begun_with_the_others() -> None:
    campaign = Campaign(replace(SPEC, at_once=1), ["late.1", "a.1", "a.2"], live=("a",))
    assert campaign.begins() == ["a.1"]
    campaign.core.see_host("late", 2, is_live=True)
    campaign.ends("a.1")
    assert campaign.begins() == ["late.1"]
    campaign.core.see_host("late", 3, is_live=False)
    campaign.ends("late.1")
    assert campaign.begins() == ["a.2"]


def test_a_silent_host_costs_the_time_of_one_wish() -> None:
    campaign = Campaign(replace(SPEC, per_host=1), ["dead.1", "dead.2"])
    assert campaign.begins() == ["dead.1"]
    assert campaign.effects() == [WriteWish("dead.1", 0)]
    revision = campaign.write("dead.1")
    step = campaign.core.next(NOW)
    assert (step.effects, step.wake_at) == ((), NOW + 100)
    assert campaign.effects(NOW + 100) == [Withdraw("dead.1", revision)]
    campaign.core.see_prevented("dead.1", SeenWish(campaign.next_revision(), NOW + 100, None, is_gone=True))
    (result,) = campaign.store_results(NOW + 100)
    assert (result.ended.phase, result.ended.code) == (WishPhase.EXPIRED, 3)
    assert campaign.begins(NOW + 100) == ["dead.2"]
    revision = campaign.write("dead.2", NOW + 100)
    assert campaign.effects(NOW + 100) == [Withdraw("dead.2", revision)]


def test_a_host_that_is_there_is_waited_for_as_long_as_it_says_that_it_is_at_it() -> None:
    campaign = Campaign(SPEC, ["a.1"], live=("a",))
    campaign.begins()
    campaign.claim("a.1")
    campaign.answer("a.1", WishPhase.RUNNING)
    late = NOW + 100 + LAST_WORD_S
    assert campaign.core.next(NOW).wake_at == late
    step = campaign.core.next(late)
    assert (step.effects, step.wake_at) == ((), math.inf)
    campaign.core.see_host("a", 5, is_live=False)
    (result,) = campaign.store_results(late)
    assert (result.ended.phase, result.ended.code) == (WishPhase.RUNNING, 3)


def test_the_result_is_the_one_that_was_stored_first() -> None:
    campaign = Campaign(SPEC, ["a.1"], live=("a",))
    campaign.begins()
    campaign.claim("a.1")
    campaign.answer("a.1", code=0)
    (stored,) = campaign.effects()
    assert isinstance(stored, StoreResult)
    assert stored.ended.state == {"name": "a.1"}
    campaign.core.see_result("a.1", replace(stored.ended, code=1))
    after = campaign.core.next(NOW).ledger
    assert after is not None
    assert (after.status, after.failed) == (CampaignStatus.DONE, 1)


def test_a_newer_wish_that_waits_does_not_say_that_this_one_has_ended() -> None:
    campaign = Campaign(SPEC, ["a.1"], live=("a",))
    campaign.begins()
    campaign.claim("a.1")
    revision = campaign.next_revision()
    newer = replace(SPEC.wish("c", VmKey("a", "1")), id="newer", who="you")
    campaign.core.see_wish("a.1", SeenWish(revision, NOW, newer, is_gone=False))
    for phase in (WishPhase.WAITING, WishPhase.RUNNING):
        assert campaign.effects() == []
        campaign.core.see_state("a.1", campaign.next_revision(), Answer(revision, "newer", phase), {})
    (result,) = campaign.store_results()
    assert (result.ended.phase, result.ended.code) == (WishPhase.SUPERSEDED, 1)


def test_what_was_put_in_flight_and_not_written_is_not_written_once_stopped() -> None:
    campaign = Campaign(SPEC, ["a.1", "a.2"], live=("a",))
    campaign.begins()
    campaign.core.see_ledger(campaign.next_revision(), campaign.core.ledger.paused())
    assert campaign.effects() == []
    campaign.core.see_ledger(campaign.next_revision(), campaign.core.ledger.stopped())
    assert sorted(campaign.effects(), key=str) == [Fence("a.1", 0), Fence("a.2", 0)]


def test_no_vm_is_begun_by_one_who_does_not_know_all_results() -> None:
    campaign = Campaign(SPEC, ["a.1", "a.2"], live=("a",))
    ledger = replace(campaign.core.ledger, ended=1)
    campaign.core.see_ledger(campaign.next_revision(), ledger)
    assert campaign.begins() == []
    campaign.core.see_results(["a.2", "other.1"])
    assert campaign.begins() == ["a.1"]


def test_ten_thousand_vms_cost_what_happens_to_them_and_the_ledger_stays_small() -> None:
    long = "x" * 60
    vms = [f"{long}{host}.{long}{vm}" for host in range(1000) for vm in range(10)]
    campaign = Campaign(replace(SPEC, at_once=500, per_host=1), vms)
    hosts = {key.partition(".")[0] for key in vms}
    for host in hosts:
        campaign.core.see_host(host, 1, is_live=True)
    judged: Counter[str] = Counter()
    judge = campaign.core._judge

    def counted(key: str, base: int, now: float) -> object:
        judged[key] += 1
        return judge(key, base, now)

    campaign.core._judge = counted  # type: ignore[method-assign,assignment]
    longest = 0
    while not campaign.core.ledger.is_over:
        step = campaign.core.next(NOW)
        for effect in step.effects:
            if isinstance(effect, WriteWish):
                campaign.claim(effect.key)
                campaign.answer(effect.key)
            else:
                assert isinstance(effect, StoreResult)
                campaign.core.see_result(effect.key, effect.ended)
        if step.ledger is not None:
            longest = max(longest, len(json.dumps(to_json(step.ledger))))
            campaign.core.see_ledger(campaign.next_revision(), step.ledger)
    assert campaign.core.ledger.reached == 10_000
    assert longest < 64 * 1024
    assert max(judged.values()) <= 5
