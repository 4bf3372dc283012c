"""The QEMU arguments of a domain document: no VM is needed for them."""

import asyncio
import enum
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qmpvcpu.cli.answer import REACHED, Answer
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.options import BadUsageError, Options, Saying
from qmpvcpu.cli.run import carry_out
from qmpvcpu.domainxml import parse, validate
from qmpvcpu.domainxml.domainrule import RuleStage
from qmpvcpu.launch import LaunchArguments, arguments

# The document of 4096 vCPUs, with a pin for each, has not a tenth of it.
_MOST_BYTES = 16 * 1024 * 1024


class _Form(enum.Enum):
    """What is printed for people.

    DEVICE: all of it as arguments. BOOT: without the vCPUs that are plugged. QMP: these, as QMP commands.
    """

    DEVICE = "device"
    BOOT = "boot"
    QMP = "qmp"


def args(
    document: Annotated[
        Path, typer.Argument(metavar="XML", help="libvirt's domain XML; - reads standard input.", show_default=False)
    ],
    *,
    device: Annotated[
        bool, typer.Option("--device/--no-device", help="Have -device arguments for the vCPUs that are plugged.")
    ] = True,
    qmp_commands: Annotated[
        bool,
        typer.Option(
            "--qmp-commands", help="Print these as QMP commands instead, and nothing else.", show_default=False
        ),
    ] = False,
    cpu: Annotated[
        str | None,
        typer.Option(
            "--cpu", metavar="CPU", help="QEMU's -cpu, where the document leaves it to the host.", show_default=False
        ),
    ] = None,
    options: Saying,
) -> int:
    """Print the QEMU arguments that rebuild the vCPUs of a domain XML, with their holes and in their order.

    -cpu, -smp, the NUMA cells, and one -device for each vCPU that QEMU does not start with: one option a line, quoted
    for a shell. Where there are cells, -m must be their sum. What the document cannot say, such as what host-model is
    on its host, is named on standard error. No VM is needed, and nothing is sent.

      qmpvcpu args vm.xml | xargs qemu-system-x86_64 -machine q35 -m 1024

      qmpvcpu args --no-device vm.xml       for a QEMU with -S or -incoming,

      qmpvcpu args --qmp-commands vm.xml    which then gets these

    Exit codes: 0 printed; 2 bad usage, or a document that cannot be read, or that libvirt would not start.
    """
    form = _Form.QMP if qmp_commands else _Form.DEVICE if device else _Form.BOOT
    said = Options(json=options.json, verbose=options.verbose)
    return carry_out(said, lambda _: _print_arguments(document, form, cpu))


async def _print_arguments(path: Path, form: _Form, cpu: str | None) -> Answer:
    """Print the QEMU arguments that rebuild the vCPUs of the document at *path*; ``-`` is standard input."""
    built = await asyncio.to_thread(_arguments_of, path, cpu)  # a large document takes seconds
    content = document(
        argv=built.boot_argv if form is _Form.BOOT else built.argv,
        device_add=[dict(device) for device in built.device_add],
        memory_mib=built.memory_mib,
        unknown=list(built.unknown),
    )
    lines = "\n".join(_lines(built, form))
    return Answer(REACHED, content, data=os.fsencode(lines) or None, complaint=built.unknown)


def _arguments_of(path: Path, cpu: str | None) -> LaunchArguments:
    xml = read_document(path)
    domain = parse(xml)
    # What libvirt would say only at the start counts too: these are for a start. All else parse() has refused.
    at_start = next((each for each in validate(xml) if each.stage is RuleStage.START), None)
    if at_start is not None:
        raise at_start
    return arguments(domain, cpu=cpu)


def _lines(built: LaunchArguments, form: _Form) -> list[str]:
    if form is _Form.QMP:
        return [json.dumps({"execute": "device_add", "arguments": dict(device)}) for device in built.device_add]
    words = built.boot_argv if form is _Form.BOOT else built.argv
    return [shlex.join(pair) for pair in zip(words[::2], words[1::2], strict=True)]


def read_document(path: Path) -> bytes:
    """Return the domain document at *path*; ``-`` is standard input.

    Raises:
        BadUsageError: It cannot be read, or is larger than any.
    """
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            # A pipe that nobody writes to has no end that could be waited for: opened so, it is empty.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(descriptor, True)
            with os.fdopen(descriptor, "rb") as file:
                data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise BadUsageError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise BadUsageError(f"{path}: larger than {_MOST_BYTES // 2**20} MiB, which no domain document is")
    return data
