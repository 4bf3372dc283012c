"""OpenTelemetry is imported by the program or not at all: nobody else pays for it, and nobody needs it."""

import subprocess
import sys

import pytest

from qmpvcpu.testing import MicroGuest

_PLUG = """
import asyncio, sys
{before}
import qmpvcpu

async def main():
    async with qmpvcpu.attach(sys.argv[1]) as vm:
        await vm.plug(3)
        await vm.set_map("0")

asyncio.run(main())
print(sorted(name for name in sys.modules if name.partition(".")[0] == "opentelemetry"))
print("qmpvcpu.traces" in sys.modules)
"""
_MISSING = """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def import_times(*arguments: str) -> str:
    """What Python says of the modules that it imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.qemu
@pytest.mark.parametrize("before", ["", _MISSING], ids=["installed", "missing"])
async def test_a_program_that_has_not_imported_it_changes_vcpus_without_it(before: str) -> None:
    async with MicroGuest() as guest:
        assert run("-c", _PLUG.format(before=before), str(guest.qmp)).split("\n")[:2] == ["[]", "False"]


@pytest.mark.qemu
async def test_a_program_that_has_imported_its_api_alone_changes_vcpus_too() -> None:
    async with MicroGuest() as guest:
        told = run("-c", _PLUG.format(before="import opentelemetry.trace"), str(guest.qmp))
        assert "opentelemetry.sdk" not in told
        assert told.endswith("True\n")


@pytest.mark.qemu
async def test_no_command_imports_it() -> None:
    async with MicroGuest() as guest:
        for words in (["plug", "3"], ["list"], ["set", "0"]):
            assert "opentelemetry" not in import_times("-m", "qmpvcpu", *words, "--qmp", str(guest.qmp))
