"""Campaigns as values: what is kept, and what operators may do to them."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from qmpvcpu.model.campaign import (
    CampaignSpec,
    CampaignStatus,
    Ended,
    Ledger,
    SelectedVms,
    campaign_key,
    ended_key,
    lease_key,
    part_key,
)
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Wish, WishOptions, WishPhase

SPEC = CampaignSpec(map=VcpuMap.parse("0-3"), options=WishOptions(on_failure=OnFailure.REVERT), who="me")
LEDGER = Ledger("c-1", SPEC, 12.5, 10, in_flight={"h.a": 0, "h.b=2E1": 17}, ended=5, failed=2, withdrawn=1)


def test_a_ledger_travels_whole() -> None:
    assert from_json(Ledger, json.dumps(to_json(LEDGER))) == LEDGER
    assert (LEDGER.waiting, LEDGER.reached) == (3, 2)


def test_a_result_travels_whole() -> None:
    ended = Ended("h", "a.1", WishPhase.ENDED, 1, "no", 3.0, {"code": 1, "steps": [{"ids": "4"}]})
    assert from_json(Ended, json.dumps(to_json(ended))) == ended
    assert ended.key == VmKey("h", "a.1")


def test_the_wish_of_a_vm_is_the_same_for_everybody() -> None:
    wish = SPEC.wish("c-1", VmKey("rack.1", "web"))
    assert wish == Wish(
        "c-1/rack=2E1/web", map=SPEC.map, options=SPEC.options, drop_after=600, who="me", campaign="c-1"
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"map": None}, "both or neither of 'map' and 'count'"),
        ({"count": 2}, "both or neither of 'map' and 'count'"),
        ({"drop_after": 0}, "'drop_after' is 0"),
        ({"at_once": 0}, "'at_once' is 0: it is from 1 to 500"),
        ({"at_once": 501}, "'at_once' is 501: it is from 1 to 500"),
        ({"per_host": 0}, "'per_host' is 0"),
        ({"stop_after": 0}, "'stop_after' is 0"),
        ({"where": "x" * 1001}, "'where' is longer"),
        ({"who": "x" * 1001}, "longer than 1000 letters"),
        ({"dry": True}, '"dry" is no key of it'),
    ],
)
def test_a_bad_campaign_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        from_json(CampaignSpec, to_json(SPEC) | change)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"id": "a.b"}, "letters, digits"),
        ({"id": ""}, "letters, digits"),
        ({"vms": 0}, "'vms' is 0"),
        ({"vms": 6}, "counts more VMs"),
        ({"failed": 6}, "counts more VMs"),
        ({"in_flight": {"h": 1}}, "is no token"),
        ({"in_flight": {"h.a": -1}}, "'in_flight': 'h.a': -1 is not a whole number"),
        ({"in_flight": ["h.a"]}, "'in_flight'"),
        ({"status": "lost"}, "'status'"),
        ({"schema": "qmpvcpu/2"}, "is not qmpvcpu/1, which this version reads"),
        ({"later": 1}, '"later" is no key of it'),
    ],
)
def test_a_bad_ledger_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        from_json(Ledger, to_json(LEDGER) | change)


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (SelectedVms, '{"vms": ["h.a", "h"], "schema": "qmpvcpu/1"}', "is no token"),
        (SelectedVms, '{"vms": ["h.a"], "schema": "x"}', "this version reads"),
        (Ended, '{"host": "", "vm": "a", "phase": "ended", "code": 0, "why": "", "time": 1, "state": {}}', "schema"),
    ],
)
def test_other_bad_values_are_refused(kind: type, text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_json(kind, text)


def test_a_result_says_whose_it_is() -> None:
    ended = Ended("", "a", WishPhase.ENDED, 0, "", 3.0, {})
    with pytest.raises(ValueError, match="which VM"):
        from_json(Ended, to_json(ended))


def test_keys_are_named_by_the_campaign() -> None:
    assert campaign_key("c-1") == "c-1"
    assert part_key("c-1", 2) == "c-1.vms.2"
    assert ended_key("c-1", "h.a") == "c-1.ended.h.a"
    assert lease_key("c-1") == "campaign.c-1"
    for bad in ("", "a.b", "*", ">"):
        with pytest.raises(ValueError, match="is no campaign's id"):
            campaign_key(bad)


def test_operators_pause_resume_and_stop() -> None:
    assert LEDGER.paused().status is CampaignStatus.PAUSED
    assert LEDGER.paused().paused().status is CampaignStatus.PAUSED
    assert LEDGER.paused().resumed().status is CampaignStatus.RUNNING
    stopping = LEDGER.paused().stopped()
    assert stopping.status is CampaignStatus.STOPPING
    assert not stopping.is_over
    assert stopping.stopped() == stopping
    stopped = replace(LEDGER, in_flight={}).stopped()
    assert stopped.status is CampaignStatus.STOPPED
    assert stopped.is_over
    assert stopped.stopped() == stopped


@pytest.mark.parametrize("what", [Ledger.paused, Ledger.resumed, Ledger.stopped])
@pytest.mark.parametrize("status", [CampaignStatus.DONE, CampaignStatus.HALTED])
def test_what_is_over_stays_so(status: CampaignStatus, what: Any) -> None:
    with pytest.raises(ValueError, match=f"^it is {status.value}: begin another"):
        what(replace(LEDGER, status=status))


def test_what_stops_does_not_go_on() -> None:
    for what in (Ledger.paused, Ledger.resumed):
        with pytest.raises(ValueError, match="is stopping: begin another"):
            what(LEDGER.stopped())


def test_the_status_follows_from_the_counts() -> None:
    done = replace(LEDGER, in_flight={}, ended=10)
    assert done.settled().status is CampaignStatus.DONE
    assert done.paused().settled().status is CampaignStatus.DONE
    halted = replace(LEDGER, failed=3).settled()
    assert halted.status is CampaignStatus.HALTED
    assert not halted.is_over
    assert replace(halted, in_flight={}).is_over
    assert replace(done, failed=3).settled().status is CampaignStatus.DONE
    assert replace(LEDGER, failed=4, spec=replace(SPEC, stop_after=None)).settled().status is CampaignStatus.RUNNING
    assert replace(LEDGER.stopped(), in_flight={}).settled().status is CampaignStatus.STOPPED
    assert LEDGER.settled() is LEDGER


def test_a_vm_whose_wish_was_withdrawn_has_not_failed() -> None:
    ended = Ended("h", "a", WishPhase.WITHDRAWN, 1, "stopped", 3.0, {})
    assert not ended.has_failed
    assert replace(ended, phase=WishPhase.EXPIRED).has_failed
    assert not replace(ended, phase=WishPhase.ENDED, code=0).has_failed
