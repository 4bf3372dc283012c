"""VcpuMap: libvirt's cpuset grammar and byte form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import InvalidMapError, VcpuMap
from qmpvcpu.model.vcpumap import union

ids = st.sets(st.integers(0, 16383), max_size=60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0}),
        ("0-3,^2", {0, 1, 3}),
        ("0,2-5", {0, 2, 3, 4, 5}),
        (" 1 , 3 - 4 ", {1, 3, 4}),
        ("5,5,5", {5}),
        ("^1,1", {1}),  # what is excluded must stand before
        ("0,^0", set()),
        ("", set()),
        ("007", {7}),
        ("0" * 5000 + "7", {7}),
        ("16383", {16383}),
    ],
)
def test_text_of_libvirts_grammar_is_read(text: str, expected: set[int]) -> None:
    assert set(VcpuMap.parse(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["a", "1,", ",1", "-1", "1-", "3-1", "^1-2", "1;2", "1.0", "0x1", "16384", "0-16384", "9" * 100_000, "²", "1 2"],
)
def test_text_outside_the_grammar_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidMapError) as caught:
        VcpuMap.parse(text)
    assert caught.value.text == text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("bad", [-1, 16384, 1.5, "3", None, True])
def test_what_is_no_vcpu_id_is_refused(bad: object) -> None:
    with pytest.raises(InvalidMapError):
        VcpuMap([bad])  # type: ignore[list-item]  # the wrong type is the test


@pytest.mark.parametrize("bad", ["0-3", "", b"\x05", bytearray(b"\x05")])
def test_text_and_bytes_are_not_taken_for_ids(bad: str | bytes) -> None:
    with pytest.raises(InvalidMapError, match=r"VcpuMap\.parse.*VcpuMap\.from_bytes"):
        VcpuMap(bad)  # type: ignore[arg-type]  # the wrong type is the test


def test_bytes_with_a_bit_beyond_libvirts_bound_are_refused_at_once() -> None:
    assert VcpuMap.from_bytes(bytes(2047) + b"\x80") == {16383}
    with pytest.raises(InvalidMapError, match="16384 is not a set of vCPU ids: a vCPU id is 0 to 16383"):
        VcpuMap.from_bytes(bytes(2048) + b"\x01")
    with pytest.raises(InvalidMapError):
        VcpuMap.from_bytes(b"\xff" * 10_000_000)


@pytest.mark.parametrize(
    ("text", "says"),
    [("^1", "excludes an id, and no id is included"), ("0,^ 1", "not a vCPU id"), ("0,", "not a vCPU id")],
)
def test_what_takes_out_of_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidMapError, match=says):
        VcpuMap.parse(text)


def test_taking_out_what_is_not_in_is_no_error_as_in_libvirt() -> None:
    assert VcpuMap.parse("0-3,^9") == {0, 1, 2, 3}


@given(ids)
def test_text_bytes_and_int_all_lead_back_to_the_map(members: set[int]) -> None:
    vcpus = VcpuMap(members)
    assert VcpuMap.parse(str(vcpus)) == vcpus
    assert VcpuMap.from_bytes(vcpus.to_bytes()) == vcpus
    assert vcpus.to_int() == sum(2**member for member in members)
    assert list(vcpus) == sorted(members)
    assert len(vcpus) == len(members)
    assert hash(vcpus) == hash(VcpuMap(sorted(members, reverse=True)))


@given(ids, ids)
def test_set_operators_keep_the_type_and_agree_with_sets(left: set[int], right: set[int]) -> None:
    mine, yours = VcpuMap(left), VcpuMap(right)
    for result, expected in [
        (mine | yours, left | right),
        (mine & yours, left & right),
        (mine - yours, left - right),
        (mine ^ yours, left ^ right),
    ]:
        assert isinstance(result, VcpuMap)
        assert set(result) == expected
    assert (mine <= yours) == (left <= right)
    assert mine == left


def test_the_text_is_the_shortest() -> None:
    assert str(VcpuMap([7, 0, 1, 3, 4, 5])) == "0-1,3-5,7"
    assert repr(VcpuMap([2])) == "VcpuMap('2')"
    assert str(VcpuMap()) == ""


def test_bytes_are_little_endian_as_virsh_has_them() -> None:
    assert VcpuMap([0, 2, 9]).to_bytes() == b"\x05\x02"
    assert VcpuMap([0]).to_bytes(4) == b"\x01\x00\x00\x00"
    assert VcpuMap().to_bytes() == b"\x00"
    with pytest.raises(OverflowError):
        VcpuMap([8]).to_bytes(1)
    assert 9 in VcpuMap([9])
    anything: object = "9"
    assert anything not in VcpuMap([9])


def test_a_set_of_anything_can_be_taken_out_or_compared_but_not_added() -> None:
    vcpus = VcpuMap([0, 3, 9])
    anything: set[object] = {3, "a", -1, 99_999, 1.5}
    assert vcpus & anything == {3}
    assert vcpus - anything == {0, 9}
    assert isinstance(vcpus - {0}, VcpuMap)
    assert {0, 1} - vcpus == {1}
    assert {1} | vcpus == {0, 1, 3, 9}
    for more in (vcpus.__or__, vcpus.__xor__):
        with pytest.raises(InvalidMapError):
            more({99_999})


@pytest.mark.parametrize("other", [3.0, True + 2, 1 << 70, -1, "3", [3], None])
def test_membership_is_that_of_any_set(other: object) -> None:
    assert (other in VcpuMap([3])) is (other == 3)


def test_a_map_and_a_frozenset_that_are_equal_have_one_hash() -> None:
    assert hash(VcpuMap([0, 5])) == hash(frozenset({0, 5}))
    assert union([VcpuMap([1]), VcpuMap(), VcpuMap([0, 1])]) == {0, 1}
