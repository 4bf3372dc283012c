"""Users of NATS with signed credentials, as its tool nsc makes them: an operator signs accounts, an account users."""

import base64
import hashlib
import json
import os
from typing import Any

import nkeys

_JETSTREAM = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
_LIMITS = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1) | {"wildcards": True}


def seed(prefix: int = nkeys.PREFIX_BYTE_USER) -> bytes:
    """Return the seed of a new key pair."""
    return bytes(nkeys.encode_seed(os.urandom(32), prefix))


def public(of: bytes) -> str:
    """Return the public key that belongs to a seed."""
    return str(nkeys.from_seed(bytearray(of)).public_key.decode())


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _signed(by: bytes, subject: str, nats: dict[str, Any]) -> str:
    claims = {"iss": public(by), "sub": subject, "name": "test", "iat": 0, "nats": {"version": 2, **nats}}
    claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
    head = _b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    text = f"{head}.{_b64(json.dumps(claims).encode())}"
    return f"{text}.{_b64(nkeys.from_seed(bytearray(by)).sign(text.encode()))}"


class Operator:
    """Who signs for one server."""

    def __init__(self) -> None:
        self._operator = seed(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = seed(nkeys.PREFIX_BYTE_ACCOUNT)

    def config(self) -> str:
        """Return the server's configuration."""
        operator = _signed(self._operator, public(self._operator), {"type": "operator"})
        system = public(seed(nkeys.PREFIX_BYTE_ACCOUNT))
        accounts = "\n".join(
            f"{account}: {_signed(self._operator, account, {'type': 'account', 'limits': _LIMITS | store})}"
            for account, store in ((public(self._account), _JETSTREAM), (system, {}))
        )
        head = f"operator: {operator}\nresolver: MEMORY\nsystem_account: {system}\n"
        return f"{head}resolver_preload: {{\n{accounts}\n}}\n"

    def credentials(self) -> str:
        """Return a credentials file for a new user of the account."""
        user = seed()
        jwt = _signed(self._account, public(user), {"type": "user", "subs": -1, "data": -1, "payload": -1})
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.decode()}\n------END USER NKEY SEED------\n"
        )
