"""Which servers, and with which files to log in there."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.bus import ServerAddress


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("nats://a:4222", ("nats://a:4222",)),
        ("a", ("nats://a:4222",)),
        ("a:5222", ("nats://a:5222",)),
        ("tls://a", ("tls://a:4222",)),
        ("nats://a:1, nats://b/,c", ("nats://a:1", "nats://b:4222", "nats://c:4222")),
        ("nats://[::1]:4222", ("nats://[::1]:4222",)),
    ],
)
def test_an_address_is_one_server_or_several(text: str, urls: tuple[str, ...]) -> None:
    address = ServerAddress(text)
    assert address.urls == urls
    assert ServerAddress(str(address)) == ServerAddress(urls) == address


@pytest.mark.parametrize(
    "text", ["nats://u:geheim@a:4222", "nats://geheim@a", "a,nats://:geheim@b", "tls://u:geheim@a"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="other users of this host can read") as refused:
        ServerAddress(text)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", " , ", "http://a", "nats://", "nats://a:b", "nats://a:70000", "nats://a/x", "ws://a", "nats://a\nb"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nats://HOST:PORT"):
        ServerAddress(text)


def test_files_are_paths_and_none_is_none() -> None:
    address = ServerAddress("a", creds="host.creds", tls_ca=Path("ca.pem"), nkey=None)
    assert (address.creds, address.tls_ca, address.nkey) == (Path("host.creds"), Path("ca.pem"), None)


def test_an_address_is_a_value() -> None:
    address = ServerAddress("a", creds="host.creds")
    assert {address: 1}[ServerAddress(["nats://a:4222"], creds=Path("host.creds"))] == 1
    assert replace(address, creds=None) == ServerAddress("a")
    with pytest.raises(FrozenInstanceError):
        address.creds = None  # type: ignore[misc]  # which is what is shown


@pytest.mark.parametrize(("name", "file"), [("creds", ""), ("tls_ca", 7)])
def test_what_cannot_be_a_file_is_refused(name: str, file: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} is a path"):
        ServerAddress("a", **{name: file})


def test_one_way_to_log_in_is_enough() -> None:
    with pytest.raises(ValueError, match="creds and login are ways to log in"):
        ServerAddress("a", creds="x", login="y")


def test_a_key_needs_its_certificate() -> None:
    with pytest.raises(ValueError, match="tls_key goes with tls_cert"):
        ServerAddress("a", tls_key="x")


@pytest.mark.parametrize(
    ("address", "must"),
    [
        (ServerAddress("nats://a"), False),
        (ServerAddress("nats://a,tls://b"), True),
        (ServerAddress("nats://a", tls_ca="x"), True),
        (ServerAddress("nats://a", tls_cert="x"), True),
    ],
)
def test_who_gives_a_certificate_or_tls_wants_nothing_to_be_sent_unencrypted(
    address: ServerAddress, must: bool
) -> None:
    assert address.must_encrypt is must
