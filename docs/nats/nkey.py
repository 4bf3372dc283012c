"""Make a key for a host or a person: the seed goes to a new file, the public key is printed for ``members``.

    python nkey.py /etc/qmpvcpu/nkey

It runs where the seed is needed, with the Python that has ``qmpvcpu[hosts]``: a seed that never travels cannot leak
on the way.
"""

import os
import sys

import nkeys


def main(path: str) -> str:
    """Write a new seed to *path*, which must not be there, and return the public key."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(seed + b"\n")
    return str(nkeys.from_seed(bytearray(seed)).public_key.decode())


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004 - this program, and the file
        sys.exit("usage: python nkey.py FILE")
    sys.stdout.write(f"{main(sys.argv[1])}\n")
