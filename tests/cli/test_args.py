"""qmpvcpu args: a document in, QEMU's arguments out, and no VM at all."""

import asyncio
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from qmpvcpu.domainxml import parse
from qmpvcpu.launch import arguments
from qmpvcpu.testing import MicroGuest, best_qemu
from tests.cli.running import environment, run

DOMAIN = """<domain type='qemu'>
  <name>vm</name>
  <memory unit='KiB'>65536</memory>
  <vcpu placement='static' current='3'>8</vcpu>
  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
    <vcpu id='2' enabled='yes' hotpluggable='yes' order='3'/>
    <vcpu id='5' enabled='yes' hotpluggable='yes' order='2'/>
  </vcpus>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <cpu mode='custom'>
    <model>qemu64</model>
    <topology sockets='2' cores='2' threads='2'/>
    <feature policy='require' name='x2apic'/>
    <numa>
      <cell id='0' cpus='0-3' memory='32' unit='MiB'/>
      <cell id='1' cpus='4-7' memory='32' unit='MiB'/>
    </numa>
  </cpu>
</domain>
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "a vm.xml"
    path.write_text(DOMAIN)
    return path


def change(document: Path, before: str, after: str) -> None:
    assert before in DOMAIN
    document.write_text(DOMAIN.replace(before, after))


async def test_one_option_a_line_quoted_for_a_shell(document: Path) -> None:
    ran = await run("args", document)
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.splitlines() == [
        "-cpu qemu64,x2apic=on",
        "-smp 1,maxcpus=8,sockets=2,dies=1,cores=2,threads=2",
        """-object '{"qom-type":"memory-backend-ram","id":"ram-node0","size":33554432}'""",
        "-numa node,nodeid=0,cpus=0-3,memdev=ram-node0",
        """-object '{"qom-type":"memory-backend-ram","id":"ram-node1","size":33554432}'""",
        "-numa node,nodeid=1,cpus=4-7,memdev=ram-node1",
        "-device qemu64-x86_64-cpu,id=vcpu5,socket-id=1,core-id=0,thread-id=1,node-id=1",
        "-device qemu64-x86_64-cpu,id=vcpu2,socket-id=0,core-id=1,thread-id=0,node-id=0",
    ]
    assert shlex.split(ran.out) == arguments(parse(DOMAIN.encode())).argv


async def test_programs_get_one_document(document: Path) -> None:
    content = (await run("--json", "args", document)).document
    built = arguments(parse(DOMAIN.encode()))
    assert content == {
        "schema": "qmpvcpu/1",
        "argv": built.argv,
        "device_add": [dict(device) for device in built.device_add],
        "memory_mib": 64,
        "unknown": [],
    }
    alone = (await run("args", "--no-device", document, "--json")).document
    assert alone["argv"] == built.boot_argv
    assert alone["device_add"] == content["device_add"]


async def test_the_plugged_vcpus_can_be_had_as_qmp_commands(document: Path) -> None:
    ran = await run("args", document, "--qmp-commands")
    commands = [json.loads(line) for line in ran.out.splitlines()]
    assert [command["execute"] for command in commands] == ["device_add", "device_add"]
    assert [command["arguments"]["id"] for command in commands] == ["vcpu5", "vcpu2"]
    assert ran.err == ""
    without = await run("args", document, "--no-device")
    assert "-device" not in without.out


async def test_where_no_vcpu_is_to_be_plugged_no_command_is_printed(document: Path) -> None:
    change(document, "current='3'", "current='8'")
    document.write_text(re.sub(r"<vcpus>.*</vcpus>", "", document.read_text(), flags=re.DOTALL))
    ran = await run("args", document, "--qmp-commands")
    assert (ran.code, ran.out) == (0, "")


async def test_a_document_comes_from_standard_input_too(document: Path) -> None:
    there = f"import os; os.dup2(os.open({str(document)!r}, os.O_RDONLY), 0)"
    assert (await run("args", "-", code=there)).out == (await run("args", document)).out


async def test_what_the_document_cannot_say_is_named_on_standard_error(document: Path) -> None:
    change(document, "mode='custom'>\n    <model>qemu64</model>", "mode='host-model'>")
    ran = await run("args", document)
    assert ran.code == 0
    assert ran.out.startswith("-cpu max,x2apic=on\n")
    assert "host-model" in ran.err
    assert "host-model" in (await run("args", document, "--json")).document["unknown"][0]
    told = await run("args", document, "--cpu", "Nehalem,x2apic=on")
    assert told.err == ""
    assert "-device Nehalem-x86_64-cpu,id=vcpu5" in told.out


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("</domain>", "", "line"),
        ("cores='2'", "cores='3'", "<cpu/topology>"),
        ("id='5' enabled='yes'", "id='9' enabled='yes'", "line 8"),
        ("order='3'", "order='2'", "order"),
        ("<model>qemu64</model>", "<model>qemu64,x=1</model>", "cannot be a QEMU CPU model"),
        ("<domain type='qemu'>", "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain type='qemu'>", "document type"),
    ],
)
async def test_a_document_that_cannot_be_started_is_bad_input(
    document: Path, before: str, after: str, words: str
) -> None:
    change(document, before, after)
    ran = await run("args", document)
    assert ran.code == 2
    assert ran.out == ""
    assert words in ran.err
    assert ran.err.startswith(f"qmpvcpu: {document}: ")
    error = (await run("--json", "args", document)).error
    assert error["kind"] in {"DomainXmlError", "DomainRuleError"}
    assert error["path"] == str(document)


async def test_a_file_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.xml", "No such file"), (tmp_path, "Is a directory")):
        ran = await run("args", path)
        assert ran.code == 2
        assert words in ran.err
    large = tmp_path / "large.xml"
    with large.open("wb") as file:
        file.truncate(2**24 + 1)
    assert "larger than 16 MiB" in (await run("args", large)).err


@pytest.mark.qemu
async def test_a_pipe_that_nobody_writes_to_is_an_empty_document(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = await run("args", str(pipe))
    assert result.code == 2
    assert "the document is empty" in result.err


async def test_the_lines_are_what_xargs_gives_to_qemu(document: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    printed = (await run("args", document)).out
    with lines.open("w") as file:
        file.write(printed)
    machine = "-machine q35 -accel tcg -m 64 -nodefaults -display none -S -qmp stdio"
    commands = '{"execute":"qmp_capabilities"}{"execute":"query-hotpluggable-cpus"}{"execute":"quit"}'
    process = await asyncio.create_subprocess_exec(
        *("xargs", "-a", str(lines), str(best_qemu()), *machine.split()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate(commands.encode())
    assert out.count(b'"/machine/peripheral/vcpu') == 2, out


@pytest.mark.parametrize("mode", [(), ("--json",)])
async def test_an_export_is_as_good_as_a_document(guest: MicroGuest, tmp_path: Path, mode: tuple[str, ...]) -> None:
    assert (await run("plug", "5", "--qmp", guest.qmp)).code == 0
    state = tmp_path / "vm.json"
    state.write_text((await run("export", "--qmp", guest.qmp, *mode)).out)
    ran = await run("args", state)
    assert ran.code == 0
    assert ran.out.startswith("-cpu qemu64\n-smp 2,maxcpus=8,")
    assert "id=vcpu5" in ran.out
    checked = await run("check-target", state, "--qmp", guest.qmp, "--json")
    assert checked.code == 1  # it runs: no target


@pytest.mark.parametrize("text", ["{}", "{", '{"export": 3}', '{"export": {}}', '{"argv": []}'])
async def test_json_that_is_no_export_is_named_as_such(tmp_path: Path, text: str) -> None:
    state = tmp_path / "vm.json"
    state.write_text(text)
    ran = await run("args", state)
    assert ran.code == 2
    assert ran.err.startswith(f"qmpvcpu: {state}: no export (qmpvcpu export -o FILE writes one): ")


async def test_the_host_s_cpu_needs_kvm_or_another_cpu(document: Path) -> None:
    change(document, "<cpu mode='custom'>", "<cpu mode='host-passthrough'>")
    refused = await run("args", document)
    assert refused.code == 2
    assert "'maximum' is the nearest to it without KVM" in refused.err
    ran = await run("args", "--cpu", "max", document)
    assert (ran.code, ran.out.splitlines()[0]) == (0, "-cpu max")


async def test_a_vm_in_the_environment_is_no_option_that_was_said(document: Path) -> None:
    assert (await run("args", document, env=environment(QMPVCPU_QMP="/nonexistent"))).code == 0
