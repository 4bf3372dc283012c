"""Wishes and the names of hosts and VMs, as they travel."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.hosts import VmKey, name_of, token
from qmpvcpu.model.options import OnFailure, Proof
from qmpvcpu.model.placement import Place, Placement
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Claim, Wish, WishOptions, WishPhase

NAMES = st.text(min_size=1).filter(lambda name: all(not 0xD800 <= ord(each) <= 0xDFFF for each in name))


@given(NAMES)
def test_a_name_is_one_token_and_back(name: str) -> None:
    written = token(name)
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", written)
    assert name_of(written) == name


@given(NAMES, NAMES)
def test_a_vm_is_a_key_and_back(host: str, vm: str) -> None:
    assert VmKey.parse(VmKey(host, vm).key) == VmKey(host, vm)


@pytest.mark.parametrize("text", ["", "a.b", "*", ">", "a b", "=2e", "=G0", "=", "ü"])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no token"):
        name_of(text)


def test_a_wish_that_a_person_writes_has_the_defaults() -> None:
    wish = from_json(Wish, '{"id": "1", "map": "0-3"}')
    assert wish == Wish("1", VcpuMap.parse("0-3"))
    assert wish.options.given() == {}


def test_a_wish_travels_whole() -> None:
    options = WishOptions.of(
        {"on_failure": OnFailure.REVERT, "timeout": 3, "proof": Proof.ONLINE, "total_timeout": 9}
    )
    wish = Wish("1", count=4, options=options, who="me", campaign="c", claim=Claim(7, 1.5, "a", 3))
    assert from_json(Wish, to_json(wish)) == wish
    assert wish.options.given() == {
        "on_failure": OnFailure.REVERT,
        "timeout": 3.0,
        "proof": Proof.ONLINE,
        "total_timeout": 9.0,
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "a JSON object"),
        ("{", "Expecting"),
        ('{"id": "", "map": "0"}', "'id' is empty"),
        ('{"map": "0"}', "'id' is missing"),
        ('{"id": "1"}', "both or neither"),
        ('{"id": "1", "map": "0", "count": 1}', "both or neither"),
        ('{"id": "1", "map": ""}', "'map' is empty"),
        ('{"id": "1", "map": "0", "include_boot": true}', "goes with a count"),
        ('{"id": "1", "map": "0", "dry": true}', '"dry" is no key of it'),
        ('{"id": "1", "map": "0", "options": {"later": 1}}', "'options': \"later\" is no key of it"),
        ('{"id": "1", "map": "0", "options": {"in_flight": 0}}', "'options': in_flight is at least 1"),
        ('{"id": "1", "map": "0", "options": {"timeout": -1}}', "'options': timeout"),
        ('{"id": "1", "map": "0", "schema": "qmpvcpu/2"}', "is not qmpvcpu/1, which this version reads"),
        ('{"id": "1", "map": "0", "drop_after": 0}', "dropped at once"),
        ('{"id": "1", "map": "0", "why": "' + "x" * 1001 + '"}', "longer than 1000"),
    ],
)
def test_a_wish_that_cannot_be_read_says_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        from_json(Wish, text)


def test_places_are_of_one_host() -> None:
    with pytest.raises(ValueError, match="host CPUs are of one host"):
        WishOptions.of({"placement": Placement(vcpus={0: Place(VcpuMap([1]))})})
    assert WishOptions.of({"placement": "preferred"}).given()["placement"] is not None


def test_phases_that_are_not_over() -> None:
    assert {phase for phase in WishPhase if not phase.is_over} == {WishPhase.WAITING, WishPhase.RUNNING}
