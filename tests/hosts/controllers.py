"""Controllers of campaigns that die, or stop at a point: each a process of its own.

``python -m tests.hosts.controllers``: a zygote as ``tests.crash.zygote``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import nats.aio.client  # noqa: F401 -- once, before the forks
import pytest

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.bus.bucket import Bucket
from qmpvcpu.hosts import CampaignController
from qmpvcpu.model.hosts import LEASES, WISHES
from tests.crash.points import Points
from tests.crash.zygote import dying_at, serve

MODULE: Final = "tests.hosts.controllers"


@dataclass(frozen=True)
class ControllerJob:
    """One campaign, to be carried out in a process of its own.

    Attributes:
        server: The server's addresses.
        campaign: The campaign.
        die_at: The point at which it kills itself.
        hold_at: The point at which it stops until SIGUSR1.
    """

    server: str
    campaign: str
    die_at: str = ""
    hold_at: str = ""


@contextmanager
def watching_writes(points: Points) -> Iterator[None]:
    """Inside, have *points* cross every write, once it is done."""
    write = Bucket._write

    async def _write(self: Bucket, key: str, value: bytes | None, last: int | None, timeout: float) -> int:
        revision = await write(self, key, value, last, timeout)
        if self.name == WISHES:
            points.cross("a wish is written" if value is not None else "a wish is withdrawn")
        elif self.name != LEASES:
            points.cross("a result is stored" if "." in key else "the ledger is written")
        return revision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "_write", _write)
        yield


async def _run(job: ControllerJob) -> None:
    points = Points(dying_at(job.die_at, hold_at=job.hold_at))
    with watching_writes(points):
        async with await Bus.connect(ServerAddress(job.server), name="controller") as bus:
            points.cross("it begins")
            await CampaignController(bus, name="controller").run(job.campaign)


if __name__ == "__main__":
    serve(lambda job: _run(ControllerJob(**job)))
