"""Which VMs of which hosts words choose."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.errors import SameNameError
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.where import Where

UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
ALL = {
    VmKey("rack1-a", "web-1"): None,
    VmKey("rack1-a", "db"): UUID,
    VmKey("rack1-b", "web-2"): None,
    VmKey("rack2-a", "web-3"): None,
    VmKey("rack2-a", "db"): None,
}


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("", ["rack1-a/db", "rack1-a/web-1", "rack1-b/web-2", "rack2-a/db", "rack2-a/web-3"]),
        ("host=rack1-*", ["rack1-a/db", "rack1-a/web-1", "rack1-b/web-2"]),
        ("name=web-*", ["rack1-a/web-1", "rack1-b/web-2", "rack2-a/web-3"]),
        ("host=rack1-* name=web-*", ["rack1-a/web-1", "rack1-b/web-2"]),
        ("name=web-[13] host=*", ["rack1-a/web-1", "rack2-a/web-3"]),
        ("host=* name=db", ["rack1-a/db", "rack2-a/db"]),
        (f"uuid={UUID.upper()}", ["rack1-a/db"]),
        ("uuid=*", ["rack1-a/db"]),
        ("name=WEB-1", []),
        ("host=rack1-a name=d?", ["rack1-a/db"]),
    ],
)
def test_all_words_must_fit(words: str, chosen: list[str]) -> None:
    assert [str(vm) for vm in Where.parse(words).choose(ALL)] == chosen


@pytest.mark.parametrize("words", ["name=db", "name=*", "name=d?"])
def test_a_name_on_two_hosts_is_not_guessed_at(words: str) -> None:
    with pytest.raises(SameNameError) as raised:
        Where.parse(words).choose(ALL)
    assert raised.value.name == "db"
    assert raised.value.hosts == ("rack1-a", "rack2-a")
    assert "rack1-a" in str(raised.value)
    assert "rack2-a" in str(raised.value)
    assert "host=*" in str(raised.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("web-1", '"web-1" chooses no VMs: write host=PATTERN, name=PATTERN, uuid=PATTERN'),
        ("rack=1", '"rack=1" chooses no VMs'),
        ("=1", '"=1" chooses no VMs'),
        ("name=", "name= has no pattern: write name=* for any"),
        ("name=a name=b", "name= is there twice"),
        ("name='a", "no closing quotation"),
    ],
)
def test_other_words_are_refused(words: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        Where.parse(words)


patterns = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(host=patterns, name=patterns, uuid=patterns)
def test_a_choice_in_words_is_read_as_it_was(host: str, name: str, uuid: str) -> None:
    where = Where(host, name, uuid)
    assert Where.parse(str(where)) == where


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("", "*.*"),
        ("host=rack1-* name=web-?", "*.*"),
        ("host=rack1-a", "rack1-a.*"),
        ("name=web.1", "*.web=2E1"),
        ("host=rack1-a name=db", "rack1-a.db"),
        (f"host=[r]ack1-a name=db uuid={UUID}", "*.db"),
    ],
)
def test_what_cannot_be_chosen_is_not_asked_of_the_server(words: str, keys: str) -> None:
    assert Where.parse(words).keys == keys
