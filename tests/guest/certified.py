"""The guests that docs/certified.md has tables of.

``python -m tests.guest.certified`` certifies them and writes the page; a test holds what is there against what each
guest does now.
"""

import asyncio
import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import qmpvcpu
from qmpvcpu.certify import Certificate, certify, wait_booted
from qmpvcpu.cli.certify import as_markdown
from qmpvcpu.testing import LinuxGuest
from qmpvcpu.testing.linuxguest import find_kernels

__all__ = ["GUESTS", "PAGE", "certificate_of", "found_in", "table_of"]

PAGE: Final = Path(__file__).parents[2] / "docs" / "certified.md"
_HEAD: Final = """# Certified guests

The tables of [`qmpvcpu certify`](certify.md) for the guests that the test suite runs. Each runs Debian's guest agent,
on a VM with 1 of 8 vCPUs plugged. The tests check the verdicts; the times are those of one run. `python -m
tests.guest.certified` writes this page.
"""

# Each with what is said of it, its kernel, and how it is started.
GUESTS: Final[Mapping[str, tuple[str, str, Mapping[str, Any]]]] = {
    "Linux 6.1": ("Debian 12's kernel. It brings new CPUs online, like most distributions.", "6.1", {}),
    "Linux 6.12": ("Debian 13's kernel. It brings new CPUs online, like most distributions.", "6.12", {}),
    "Linux 6.12 that leaves CPUs offline": (
        "Without a udev rule, Linux leaves a new CPU offline. The agent brings it online.",
        "6.12",
        {"auto_online": False},
    ),
    "Linux 6.12 that detects no hypervisor": (
        "Since 6.12.77 it acknowledges a vCPU and [never takes it](what-happens.md#what-is-known-beforehand).",
        "6.12",
        {"hypervisor": False},
    ),
}


async def certificate_of(name: str) -> Certificate:
    """Certify one of the guests."""
    _, kernel, how = GUESTS[name]
    async with (
        LinuxGuest(kernel=kernel, boot=1, **how) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent, name=name) as vm,
    ):
        system = await wait_booted(vm, timeout=30)
        timeout = 3.0 if "hypervisor" in how else 30.0  # it waits in vain
        async with contextlib.aclosing(certify(vm, fresh=True, timeout=timeout)) as rows:
            return Certificate.of(vm.capabilities, [row async for row in rows], system)


def table_of(name: str) -> str:
    """Return the table of one guest that the page has."""
    section = PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    return "\n".join(line for line in section.splitlines() if line.startswith("|"))


def found_in(table: str) -> list[str]:
    """Return the rows of a table without its head, which names the QEMU, and without what differs from run to run."""
    return [re.sub(r"\d+(\.\d+)?", "N", line) for line in table.splitlines()[2:]]


async def _main() -> None:
    sections = [_HEAD]
    for name, (words, kernel, _) in GUESTS.items():
        assert kernel in find_kernels(), f"no kernel {kernel}"
        sections.append(f"## {name}\n\n{words}\n\n{as_markdown(await certificate_of(name))}\n")
    PAGE.write_text("\n".join(sections))


if __name__ == "__main__":
    asyncio.run(_main())
