"""A hundred real QEMUs behind one exporter, and all of them stopped."""

import contextlib
import time
from pathlib import Path

import pytest

from tests.fleet.vms import guests, stopped
from tests.metrics.scraping import exporting
from tests.waiting import until

pytestmark = pytest.mark.qemu

MANY = 100


async def test_a_hundred_stopped_vms_delay_no_scrape(tmp_path: Path) -> None:
    async with guests(MANY) as vms, exporting("--dir", tmp_path, "--reply-timeout", "60") as exporter:
        for number, vm in enumerate(vms):
            (tmp_path / f"vm{number}.qmp").symlink_to(vm.qmp)

        async def all_are(up: int) -> bool:
            return [*(await exporter.scrape()).up.values()] == [up] * MANY

        await until(lambda: all_are(1), 60)
        with contextlib.ExitStack() as stack:
            for vm in vms:
                stack.enter_context(stopped(vm))
            assert await all_are(0)
            before = time.monotonic()
            page = await exporter.scrape()
            took = time.monotonic() - before
            assert len(page["qmpvcpu_reading_age_seconds"]) == MANY
            assert len(page["libvirt_domain_vcpu_time_seconds_total"]) == MANY
            assert took < 30  # each of them, waited for, would take a minute
        await until(lambda: all_are(1), 60)
