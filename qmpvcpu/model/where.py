"""Which VMs of which hosts: a choice in words, such as ``host=rack1-* name=web-*``."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from qmpvcpu.errors import SameNameError, shorten
from qmpvcpu.model.hosts import VmKey, token


@dataclass(frozen=True)
class Where:
    """Which VMs are chosen: a pattern for each attribute, "" for any.

    Patterns have ``*``, ``?`` and ``[...]``, as in a shell. Case matters, except in a uuid. A VM without a uuid
    matches no pattern for one.

    Attributes:
        host: The host's name.
        name: The VM's name.
        uuid: The VM's uuid.
    """

    host: str = ""
    name: str = ""
    uuid: str = ""

    @classmethod
    def parse(cls, text: str) -> "Where":
        """Return the choice that *text* makes: words ``host=PATTERN``, ``name=PATTERN`` and ``uuid=PATTERN``.

        A VM must match all that are given; without any, every VM of every host is chosen. Quote a pattern with spaces
        as in a shell: ``name='my vm'``.

        Raises:
            ValueError: A word is none of these, is there twice, or has no pattern.
        """
        known = [field.name for field in fields(cls)]
        usage = ", ".join(f"{name}=PATTERN" for name in known)
        found: dict[str, str] = {}
        for word in _words(text):
            name, equals, pattern = word.partition("=")
            if not equals or name not in known:
                raise ValueError(f"{shorten(word)} chooses no VMs: write {usage}")
            if not pattern:
                raise ValueError(f"{name}= has no pattern: write {name}=* for any")
            if name in found:
                raise ValueError(f"{name}= is there twice, and a VM must fit both: give one pattern")
            found[name] = pattern
        return cls(**found)

    @property
    def keys(self) -> str:
        """The narrowest filter of keys, as the server takes it, that all VMs fit which can be chosen."""
        return ".".join("*" if _is_pattern(each) else token(each) for each in (self.host, self.name))

    def takes(self, vm: VmKey, uuid: str | None) -> bool:
        """Return True if *vm*, which has *uuid*, is chosen."""
        return (
            fnmatchcase(vm.host, self.host or "*")
            and fnmatchcase(vm.vm, self.name or "*")
            and (not self.uuid or (uuid is not None and fnmatchcase(uuid.lower(), self.uuid.lower())))
        )

    def choose(self, uuids: Mapping[VmKey, str | None]) -> tuple[VmKey, ...]:
        """Return those that are chosen, ordered by host and name, from all VMs and the uuid of each.

        Raises:
            SameNameError: Without ``host=``, a name or uuid was given that fits VMs of one name on two hosts: it may
                be that only one was meant.
        """
        chosen = tuple(sorted(vm for vm, uuid in uuids.items() if self.takes(vm, uuid)))
        if (self.name or self.uuid) and not self.host:
            hosts: dict[str, str] = {}
            for vm in chosen:
                other = hosts.setdefault(vm.vm, vm.host)
                if other != vm.host:
                    raise SameNameError(vm.vm, (other, vm.host))
        return chosen

    def __str__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return " ".join(f"{name}={shlex.quote(pattern)}" for name, pattern in given if pattern)


def _is_pattern(text: str) -> bool:
    return not text or any(map(text.__contains__, "*?["))


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{shorten(text)}: {error}".rstrip(".").replace("No closing", "no closing")) from error
