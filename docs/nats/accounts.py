"""Print ``accounts.conf`` for nats-server from a list of members: an account for each, with what its kind needs.

    python3 accounts.py members > accounts.conf

It needs nothing but Python, so it runs on the server's host. A line of *members* is ``KIND NAME KEY``:

- KIND is ``admin``, ``host``, ``operator`` or ``reader``;
- NAME is the host's name, or who it is;
- KEY is a public nkey (``U...``), or the bcrypt hash of a password (``$2y$...``).

Why an account each, and not one account whose users have permissions: whoever may ask JetStream anything names the
subject that the answer goes to, and the server does not check whether they may publish there. So a reader could have
answers written over states, and a host could copy a wish of its own over another host's. In an account of its own, an
answer goes nowhere else, and the account's imports are all that it reaches.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

BUCKETS = ("qmpvcpu_wishes", "qmpvcpu_states", "qmpvcpu_leases", "qmpvcpu_campaigns")
STREAMS = (*(f"KV_{bucket}" for bucket in BUCKETS), "qmpvcpu_events")
LOOKS = ("list", "plan", "statistics")
"""The operations that change nothing."""
LONGEST_ANSWER = "24h"
"""How long an answer may take: the server forgets after two minutes who asked, where nothing is said."""

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,200}")
_NKEY = re.compile(r"U[A-Z2-7]{55}")
_HASH = re.compile(r"\$2[abxy]\$\d\d\$[A-Za-z0-9./]{53}")


class Kind(Enum):
    """What a member is."""

    ADMIN = "admin"
    HOST = "host"
    OPERATOR = "operator"
    READER = "reader"


@dataclass(frozen=True)
class Member:
    """Who may connect."""

    kind: Kind
    name: str
    key: str

    @classmethod
    def parse(cls, line: str) -> "Member":
        """Return who *line* names.

        Raises:
            ValueError: It is no such line.
        """
        try:
            word, name, key = line.split()
        except ValueError:
            raise ValueError(f"{line!r}: a line is KIND NAME KEY") from None
        kind = Kind(word)  # its error names the word
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r}: a name has letters, digits, '_', '-', '.' and '@'")
        if not _NKEY.fullmatch(key) and not _HASH.fullmatch(key):
            raise ValueError(f"{name}: its key is neither a public nkey (U and 55 more) nor a bcrypt hash ($2y$...)")
        return cls(kind, name, key)

    @property
    def token(self) -> str:
        """The name, as one token of a subject: as ``qmpvcpu.model.hosts.token`` writes it."""
        return self.name.replace(".", "=2E").replace("@", "=40")

    @property
    def account(self) -> str:
        """The name of its account."""
        return "QMPVCPU" if self.kind is Kind.ADMIN else f"{self.kind.name}_{self.token}"

    @property
    def login(self) -> str:
        """What it shows the server."""
        return f'nkey: "{self.key}"' if _NKEY.fullmatch(self.key) else f'user: "{self.name}", password: "{self.key}"'

    @property
    def inbox(self) -> str:
        """Where everything arrives that is for it."""
        return f"_INBOX.host.{self.token}.>" if self.kind is Kind.HOST else f"_INBOX.who.{self.token}.>"

    @property
    def requests(self) -> str:
        """The requests that it answers, if it is a host."""
        return f"qmpvcpu.do.{self.token}.*.*"

    def writes(self) -> list[str]:
        """Return the subjects of what it may write and ask for, besides reading."""
        me = self.token
        if self.kind is Kind.HOST:
            keys = [f"$KV.qmpvcpu_wishes.{me}.>", f"$KV.qmpvcpu_states.{me}.>", f"$KV.qmpvcpu_leases.host.{me}"]
            return [*keys, f"qmpvcpu.event.{me}.>"]
        if self.kind is Kind.OPERATOR:
            keys = ["$KV.qmpvcpu_wishes.>", "$KV.qmpvcpu_campaigns.>", "$KV.qmpvcpu_leases.campaign.>"]
            return [*keys, f"qmpvcpu.do.*.*.{me}"]
        return [f"qmpvcpu.do.*.{look}.{me}" for look in LOOKS]

    def reads(self) -> Iterator[str]:
        """Return the subjects of JetStream's API that it may ask."""
        yield "$JS.API.INFO"  # also keeps the server from answering for this account itself
        if self.kind is Kind.HOST:
            mine = {
                "qmpvcpu_wishes": f"{self.token}.>",
                "qmpvcpu_states": f"{self.token}.>",
                "qmpvcpu_leases": "clock",  # never written: to watch it shows the server's time
            }
            yield from (f"$JS.API.STREAM.INFO.{stream}" for stream in STREAMS)  # it looks whether they are ours
            for bucket, keys in mine.items():
                yield f"$JS.API.STREAM.MSG.GET.KV_{bucket}"
                yield f"$JS.API.CONSUMER.CREATE.KV_{bucket}.*.$KV.{bucket}.{keys}"
                yield f"$JS.FC.KV_{bucket}.>"
        else:
            for stream in STREAMS:
                yield from read_all(stream)


def read_all(stream: str) -> list[str]:
    """Return the subjects that read all of *stream*, with any client of NATS."""
    return [
        f"$JS.API.STREAM.INFO.{stream}",
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
        f"$JS.API.CONSUMER.CREATE.{stream}",
        f"$JS.API.CONSUMER.CREATE.{stream}.>",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        f"$JS.API.CONSUMER.DELETE.{stream}.*",
        f"$JS.FC.{stream}.>",
    ]


def central(members: list[Member]) -> Iterator[str]:
    """Yield the account of the buckets and the stream: it offers what the others import."""
    yield "  QMPVCPU {"
    yield "    jetstream: enabled"
    yield "    users: ["
    yield from (f"      {{{each.login}}}" for each in members if each.kind is Kind.ADMIN)
    yield "    ]"
    yield "    exports: ["
    yield from (f'      {{service: "$KV.{bucket}.>"}}' for bucket in BUCKETS)
    yield '      {service: "qmpvcpu.event.>"}'
    yield '      {service: "$JS.API.INFO"}'
    for stream in STREAMS:
        yield from (f'      {{service: "{subject}"}}' for subject in read_all(stream))
    yield '      {stream: "_INBOX.host.>"}'
    yield '      {stream: "_INBOX.who.>"}'
    yield '      {stream: "$SRV.>"}'
    yield '      {service: "_INBOX.admin.>"}'
    yield "    ]"
    yield "  }"


def requests(members: list[Member]) -> Iterator[str]:
    """Yield the account that requests pass through on their way to the hosts.

    It is apart from that of the buckets: the server looks for circles at its start, which would take minutes where
    each of some thousand hosts imports from the account that imports from all of them.
    """
    yield "  REQUESTS {"
    yield f'    exports: [{{service: "qmpvcpu.do.>", response_threshold: "{LONGEST_ANSWER}"}}]'
    yield "    imports: ["
    for each in members:
        if each.kind is Kind.HOST:
            yield f'      {{service: {{account: "{each.account}", subject: "{each.requests}"}}}}'
    yield "    ]"
    yield "  }"


def own(member: Member) -> Iterator[str]:
    """Yield the account of *member*. Its permissions repeat its imports, so that what is refused is an error."""
    publish = [*member.writes(), *member.reads()]
    subscribe = [member.inbox]
    streams = [member.inbox]
    if member.kind is Kind.HOST:
        publish.append("_INBOX.admin.>")  # `nats --inbox-prefix=_INBOX.admin micro ls`
        subscribe += [member.requests, "$SRV.>"]
        streams.append("$SRV.>")
    yield f'  "{member.account}" {{'
    yield f"    users: [{{{member.login}, permissions: {{"
    yield "      publish: ["
    yield from (f'        "{subject}"' for subject in publish)
    if member.kind is Kind.HOST:
        yield '        "_R_.>"'  # the answers to requests
    yield "      ]"
    yield f"      subscribe: [{', '.join(f'{chr(34)}{subject}{chr(34)}' for subject in subscribe)}]"
    yield "    }}]"
    if member.kind is Kind.HOST:
        yield f'    exports: [{{service: "{member.requests}", response_threshold: "{LONGEST_ANSWER}"}}]'
    yield "    imports: ["
    for subject in publish:
        owner = "REQUESTS" if subject.startswith("qmpvcpu.do.") else "QMPVCPU"
        yield f'      {{service: {{account: {owner}, subject: "{subject}"}}}}'
    yield from (f'      {{stream: {{account: QMPVCPU, subject: "{subject}"}}}}' for subject in streams)
    yield "    ]"
    yield "  }"


def accounts(members: list[Member]) -> str:
    """Return the text of ``accounts.conf`` for *members*.

    Raises:
        ValueError: A name is there twice.
    """
    # An operator and a reader of one name would have one inbox, and be one name in the audit.
    names = Counter((each.kind is Kind.HOST, each.token) for each in members)
    if twice := sorted(name for (_, name), times in names.items() if times > 1):
        raise ValueError(f"{', '.join(twice)}: a name is there twice")
    lines = ["# Made by accounts.py: change the list of members, and make it again.", "accounts {"]
    lines += [*central(members), "", *requests(members)]
    for member in members:
        if member.kind is not Kind.ADMIN:
            lines += ["", *own(member)]
    return "\n".join([*lines, "}", ""])


def main(path: str) -> str:
    """Return the text for the members in the file *path*; end the program with what is wrong in it."""
    members: list[Member] = []
    for number, raw in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        try:
            members += [Member.parse(line)] if line else []
        except ValueError as error:
            sys.exit(f"{path}:{number}: {error}")
    try:
        return accounts(members)
    except ValueError as error:
        sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004 - this program, and the file
        sys.exit("usage: python3 accounts.py MEMBERS > accounts.conf")
    sys.stdout.write(main(sys.argv[1]))
