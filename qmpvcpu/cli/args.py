"""args: the QEMU arguments of a domain document. No VM is needed for them."""

import asyncio
import enum
import json
import os
import shlex

import click

from qmpvcpu.cli.options import (
    OUTPUT_OPTIONS,
    File,
    command,
    exported_in,
    flag,
    naming_document,
    option,
    read_document,
)
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.domainxml import parse, validate
from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
from qmpvcpu.launch import LaunchArguments, arguments


class _Form(enum.Enum):
    """What is printed for people.

    DEVICE: all of it as arguments. BOOT: without the vCPUs that are plugged. QMP: these, as QMP commands.
    """

    DEVICE = "device"
    BOOT = "boot"
    QMP = "qmp"


@command(
    click.Argument(["xml"], metavar="XML", type=File()),
    click.Option(
        ["--device/--no-device"],
        default=True,
        show_default=True,
        help="Have -device arguments for the vCPUs that are plugged.",
    ),
    flag("--qmp-commands", "Print these as QMP commands instead, and nothing else."),
    option("--cpu", metavar="CPU", help="QEMU's -cpu, where the document leaves it to the host."),
    *OUTPUT_OPTIONS,
)
async def args(_: Shell, *, xml: str, device: bool, qmp_commands: bool, cpu: str | None) -> CommandResult:
    """Print the QEMU arguments that rebuild the vCPUs of a domain XML, with their holes and in their order.

    XML is libvirt's domain XML, a record, or what export has written; - reads standard input.

    -cpu, -smp, the NUMA cells, and one -device for each vCPU that QEMU does not start with: one option a line, quoted
    for a shell. Where there are cells, -m must be their sum. What the document cannot say, such as what host-model is
    on its host, is named on standard error. No VM is needed, and nothing is sent.

      qmpvcpu args vm.xml | xargs qemu-system-x86_64 -machine q35 -m 1024

      qmpvcpu args --no-device vm.xml       for a QEMU with -S or -incoming,

      qmpvcpu args --qmp-commands vm.xml    which then gets these

    Exit codes: 0 printed; 2 bad usage, or a document that cannot be read, or that libvirt would not start.
    """
    form = _Form.QMP if qmp_commands else _Form.DEVICE if device else _Form.BOOT
    built = await asyncio.to_thread(_arguments_of, xml, cpu)  # a large document takes seconds
    content = document(
        argv=built.boot_argv if form is _Form.BOOT else built.argv,
        device_add=[dict(device) for device in built.device_add],
        memory_mib=built.memory_mib,
        unknown=list(built.unknown),
    )
    lines = "\n".join(_lines(built, form))
    return CommandResult(REACHED, content, (), built.unknown, os.fsencode(lines) or None)


def _arguments_of(path: str, cpu: str | None) -> LaunchArguments:
    xml = read_document(path)
    if xml.lstrip().startswith(b"{"):
        return arguments(exported_in(path, xml).layout, cpu=cpu)
    with naming_document(path):
        domain = parse(xml)
        # What libvirt would say only at the start counts too: these are for a start. All else parse() has refused.
        for each in validate(xml):
            is_replaced = cpu is not None and each.rule is DomainRule.PASSTHROUGH_WITHOUT_KVM
            if each.stage is RuleStage.START and not is_replaced:
                raise each
        return arguments(domain, cpu=cpu)


def _lines(built: LaunchArguments, form: _Form) -> list[str]:
    if form is _Form.QMP:
        return [json.dumps({"execute": "device_add", "arguments": dict(device)}) for device in built.device_add]
    words = built.boot_argv if form is _Form.BOOT else built.argv
    return [shlex.join(pair) for pair in zip(words[::2], words[1::2], strict=True)]
