"""What the agent's answers mean. Pure: no I/O.

Every ``parse_`` raises NonsenseError, whose text says what is wrong, if an answer lacks what it is read for, or
something in it is out of bounds: the guest is hostile.

Source: QEMU qga/qapi-schema.json; qga/commands-posix.c and commands-linux.c for the texts of errors.
"""

import base64
import binascii
import errno
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from qmpvcpu.errors import clip, printable, shorten
from qmpvcpu.model.guest import GuestCpu, GuestOs
from qmpvcpu.model.vcpumap import MOST_VCPUS

_LARGEST_HANDLE: Final = (1 << 63) - 1  # QAPI's int
_MOST_COMMANDS: Final = 1000
_LONGEST_TEXT: Final = 200
_QUOTED: Final = 60

# What strerror() says: glibc's words first, musl's after them.
_WORDS: Final = {
    "Device or resource busy": errno.EBUSY,
    "Resource busy": errno.EBUSY,
    "Invalid argument": errno.EINVAL,
    "Operation not permitted": errno.EPERM,
    "Permission denied": errno.EACCES,
    "No such file or directory": errno.ENOENT,
    "No such device": errno.ENODEV,
    "Input/output error": errno.EIO,
    "I/O error": errno.EIO,
    "Cannot allocate memory": errno.ENOMEM,
    "Out of memory": errno.ENOMEM,
    "No space left on device": errno.ENOSPC,
    "Resource temporarily unavailable": errno.EAGAIN,
    "Read-only file system": errno.EROFS,
    "Operation not supported": errno.EOPNOTSUPP,
    "Not supported": errno.EOPNOTSUPP,
    "Function not implemented": errno.ENOSYS,
    "Connection timed out": errno.ETIMEDOUT,
    "Operation timed out": errno.ETIMEDOUT,
}
# What they mean for a CPU that is to go online or offline (Linux kernel/cpu.c, kernel/sched/core.c).
_MEANING: Final = {
    errno.EBUSY: "deadline tasks need this CPU, or the guest changes no CPU at this moment",
    errno.EINVAL: "there is no such CPU in the guest, or its system does not start it",
    errno.ENOENT: "there is no such CPU in the guest",
    errno.ENODEV: "there is no such CPU in the guest",
    errno.EPERM: "the guest's system does not let the agent do this",
    errno.EACCES: "the guest's system does not let the agent do this",
    errno.EROFS: "the guest has /sys read-only",
    errno.EIO: "the CPU did not start in the guest",
    errno.ETIMEDOUT: "the CPU did not start in the guest in time",
    errno.ENOMEM: "the guest has no memory for it",
}
_NUMBER_IN: Final = re.compile(r"cpu([0-9]{1,5})/|processor #([0-9]{1,5})")
_DISABLED: Final = re.compile("has been disabled|command is not (currently )?supported", re.IGNORECASE)


class NonsenseError(ValueError):
    """An answer makes no sense."""


class GuestError(NamedTuple):
    """What an error of the agent says.

    Attributes:
        reason: The agent's text, and what that means.
        errno: The name of the guest's error, such as ``EBUSY``, or "".
        number: The guest's number of the CPU concerned, or None.
    """

    reason: str
    errno: str
    number: int | None


class Port(NamedTuple):
    """The agent's port, as QEMU has it.

    Attributes:
        is_open: True if a process in the guest has it open.
        has_client: True if a client is connected to its socket.
    """

    is_open: bool
    has_client: bool


def parse_vcpus(answer: object) -> tuple[GuestCpu, ...]:
    """Read the answer to ``guest-get-vcpus``: the guest's CPUs by number. The agent sends them in no order."""
    if not isinstance(answer, list):
        raise NonsenseError("it is no list")
    if len(answer) > MOST_VCPUS:
        raise NonsenseError(f"it lists {len(answer)} CPUs, and no VM has more than {MOST_VCPUS}")
    cpus: dict[int, GuestCpu] = {}
    for entry in answer:
        cpu = _parse_cpu(entry)
        if cpu.number in cpus:
            raise NonsenseError(f"it lists CPU {cpu.number} twice")
        cpus[cpu.number] = cpu
    if not cpus:
        raise NonsenseError("it lists no CPU")
    if 0 not in cpus:
        raise NonsenseError("it does not list CPU 0")
    if not any(cpu.online for cpu in cpus.values()):
        raise NonsenseError("no CPU in it is online, and one of them answers")
    return tuple(cpus[number] for number in sorted(cpus))


def _parse_cpu(entry: object) -> GuestCpu:
    if not isinstance(entry, Mapping):
        raise NonsenseError(f"an entry is no object: {shorten(entry, _QUOTED)}")
    number, online, can_offline = (entry.get(key) for key in ("logical-id", "online", "can-offline"))
    if type(number) is not int or not 0 <= number < MOST_VCPUS:
        raise NonsenseError(f"logical-id {shorten(number, _QUOTED)} is not a number from 0 to {MOST_VCPUS - 1}")
    # can-offline is optional: absent means that the agent cannot tell.
    if type(online) is not bool or not isinstance(can_offline, bool | None):
        raise NonsenseError(f"online and can-offline of CPU {number} are not true or false")
    return GuestCpu(number, online, can_offline is not False)


def parse_count(answer: object, asked: int) -> int:
    """Read the answer to ``guest-set-vcpus``: how many of the *asked* entries were carried out, from the first on."""
    if type(answer) is not int or not 0 <= answer <= asked:
        raise NonsenseError(f"it is no number from 0 to {asked}")
    return answer


def parse_osinfo(answer: object) -> GuestOs:
    """Read the answer to ``guest-get-osinfo``."""
    if not isinstance(answer, Mapping):
        raise NonsenseError("it is no object")
    keys = ("id", "name", "version", "kernel-release", "machine", "pretty-name", "variant-id")
    texts = []
    for key in keys:
        value = answer.get(key, "")
        if not isinstance(value, str):
            raise NonsenseError(f"{key} is no text")
        texts.append(printable(clip(value, _LONGEST_TEXT)))
    return GuestOs(*texts)


def parse_commands(answer: object) -> frozenset[str]:
    """Read the answer to ``guest-info``: the commands that the agent carries out."""
    listed: Any = answer.get("supported_commands") if isinstance(answer, Mapping) else None
    if not isinstance(listed, list) or len(listed) > _MOST_COMMANDS:
        raise NonsenseError("supported_commands is no list of commands")
    enabled = set()
    for entry in listed:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or len(name) > _LONGEST_TEXT:
            raise NonsenseError(f"a command has no name: {shorten(entry, _QUOTED)}")
        if entry.get("enabled") is True:
            enabled.add(name)
    return frozenset(enabled)


def parse_handle(answer: object) -> int:
    """Read the answer to ``guest-file-open``."""
    if type(answer) is not int or not 0 <= answer <= _LARGEST_HANDLE:
        raise NonsenseError("it is no handle")
    return answer


def parse_read(answer: object, limit: int) -> tuple[bytes, bool]:
    """Read the answer to ``guest-file-read``: at most *limit* bytes, and whether they are the file's last."""
    text: Any = answer.get("buf-b64") if isinstance(answer, Mapping) else None
    eof: Any = answer.get("eof") if isinstance(answer, Mapping) else None
    if not isinstance(text, str) or type(eof) is not bool or len(text) > 2 * limit + 4:
        raise NonsenseError(f"it is not a piece of at most {limit} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NonsenseError("it is not in base64") from None
    if len(data) > limit:
        raise NonsenseError(f"it is not a piece of at most {limit} bytes")
    return data, eof


def explain_error(command: str, desc: str) -> GuestError:
    """Return what an error's text says. The text is the guest's: it is clipped, and searched for a kernel's words."""
    shown = printable(clip(desc))
    code = next((code for words, code in _WORDS.items() if desc.endswith(words)), None)
    found = _NUMBER_IN.search(desc[:1000])
    number = int(found[1] or found[2]) if found else None
    meaning = _MEANING.get(code, "") if code is not None and command == "guest-set-vcpus" else ""
    if "can't be offlined" in desc:
        meaning = "its system does not let this CPU go offline"
    reason = f"{meaning}: {shown}" if meaning else shown
    return GuestError(reason, errno.errorcode[code] if code is not None else "", number)


def is_unsupported(error_class: str, desc: str) -> bool:
    """Return True if the agent did not try to carry a command out, as it has none of that name or may not."""
    return error_class == "CommandNotFound" or _DISABLED.search(desc[:1000]) is not None


def is_forbidden(error_class: str, desc: str) -> bool:
    """Return True if the agent's configuration forbids a command; older ones say so in words only."""
    return is_unsupported(error_class, desc) and ("has been disabled" in desc or "allow" in desc)


def parse_port(answer: object, path: str) -> Port | None:
    """Read the state of the port whose socket is at *path* from the answer to ``query-chardev``.

    For TCP, *path* is ``tcp:HOST:PORT``. QEMU names a socket as its command line did, perhaps by a relative path:
    then its file name is compared, if no other socket has the same. None: the answer does not tell.

    Source: QEMU qapi/char.json; chardev/char-socket.c for ``filename``.
    """
    ports: dict[str, list[Port]] = {}
    for entry in answer if isinstance(answer, list) else ():
        filename = entry.get("filename") if isinstance(entry, Mapping) else None
        is_open = entry.get("frontend-open") if isinstance(entry, Mapping) else None
        if isinstance(filename, str) and isinstance(is_open, bool):
            rest = filename.removeprefix("disconnected:")
            place = rest.removeprefix("unix:").partition(",server")[0]
            port = Port(is_open, has_client=rest == filename)
            for name in {place, place.rpartition("/")[2]}:
                ports.setdefault(name, []).append(port)
    for name in (path, path.rpartition("/")[2]):
        if len(found := ports.get(name, [])) == 1:
            return found[0]
    return None
