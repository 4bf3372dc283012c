"""The command line with the agent of a real Linux, which leaves plugged CPUs offline."""

from pathlib import Path

import pytest

from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator
from tests.cli.running import Ran, run

pytestmark = pytest.mark.guest


async def test_the_commands_prove_and_undo_what_a_real_guest_does(
    qemu: Path, accel: Accelerator, kernel: str
) -> None:
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1, auto_online=False) as guest:

        async def ask(*words: str) -> Ran:
            return await run(*words, "--json", "--qmp", guest.qmp, "--agent", guest.agent)

        only_looked = await ask("plug", "5", "--proof", "online", "--no-online", "--timeout", "2")
        assert (only_looked.code, only_looked.error["kind"]) == (1, "UnprovenError")
        assert only_looked.error["hint"].startswith("without --no-online the agent brings it online")
        assert (await ask("guest", "online", "5")).document["changed"] == "5"
        grown = (await ask("set", "0,2,5", "--proof", "online")).document
        assert grown["steps"][0]["proofs"]["online"] > grown["steps"][0]["proofs"]["present"]
        listed = (await ask("guest", "list")).document
        assert listed["os"]["kernel"].startswith(kernel)
        cpus = [(cpu["vcpu"], cpu["online"], cpu["known_by"]) for cpu in listed["cpus"]]
        assert sorted(cpus) == [(vcpu, True, "firmware") for vcpu in (0, 2, 5)]
        shown = (await ask("list")).document["vcpus"]
        assert [vcpu["id"] for vcpu in shown if vcpu["proof"] == "online"] == [0, 2, 5]

        await guest.refuse()
        refused = await ask("unplug", "5", "--offline-first")
        assert (refused.code, refused.error["by_agent"], refused.document["pending"]) == (1, True, "")
        await guest.comply()
        assert (await ask("unplug", "5", "--offline-first")).code == 0
        gone = await ask("set", "0", "--offline-first", "--on-failure", "revert")
        assert (gone.code, gone.document["enabled"]) == (0, "0")

        await guest.pause_agent()
        silent = await ask("guest", "list", "--timeout", "1")
        assert (silent.code, silent.error["port_open"]) == (3, True)
        assert (await ask("list", "--reply-timeout", "2")).document["agent_error"]["kind"] == "AgentSilentError"
