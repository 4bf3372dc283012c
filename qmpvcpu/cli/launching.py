"""The QEMU arguments of a domain document: no VM is needed for them."""

import asyncio
import enum
import json
import shlex
import sys
from pathlib import Path

from qmpvcpu.cli.options import BadUsageError
from qmpvcpu.cli.run import REACHED, Answer
from qmpvcpu.cli.show import document
from qmpvcpu.domainxml import parse, validate
from qmpvcpu.launch import LaunchArguments, arguments

__all__ = ["Form", "print_arguments"]

# The document of 4096 vCPUs, with a pin for each, has not a tenth of it.
_MOST_BYTES = 16 * 1024 * 1024


class Form(enum.Enum):
    """What is printed for people.

    DEVICE: all of it as arguments. BOOT: without the vCPUs that are plugged. QMP: these, as QMP commands.
    """

    DEVICE = "device"
    BOOT = "boot"
    QMP = "qmp"


async def print_arguments(path: Path, form: Form, cpu: str | None) -> Answer:
    """Print the QEMU arguments that rebuild the vCPUs of the document at *path*; ``-`` is standard input."""
    xml = await asyncio.to_thread(_read, path)
    broken = validate(xml)
    if broken:  # what libvirt would say only at the start counts too: these are for a start
        raise broken[0]
    built = arguments(parse(xml), cpu=cpu)
    content = document(
        argv=built.boot_argv if form is Form.BOOT else built.argv,
        device_add=[dict(device) for device in built.device_add],
        memory_mib=built.memory_mib,
        unknown=list(built.unknown),
    )
    return Answer(REACHED, content, "\n".join(_lines(built, form)), complaint=built.unknown)


def _lines(built: LaunchArguments, form: Form) -> list[str]:
    if form is Form.QMP:
        return [json.dumps({"execute": "device_add", "arguments": dict(device)}) for device in built.device_add]
    words = built.boot_argv if form is Form.BOOT else built.argv
    return [shlex.join(pair) for pair in zip(words[::2], words[1::2], strict=True)]


def _read(path: Path) -> bytes:
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise BadUsageError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise BadUsageError(f"{path}: larger than {_MOST_BYTES // 2**20} MiB, which no domain document is")
    return data
