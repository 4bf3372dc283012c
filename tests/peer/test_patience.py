"""How long the test kit waits is checked as every other duration is."""

import math
from typing import Any

import pytest

from qmpvcpu.testing import LinuxGuest, MicroGuest, ScriptedPeer, probe_accelerator

NO_DURATION = r"is a (finite )?number of seconds"


@pytest.mark.parametrize("given", ["5", True, math.nan, math.inf, -1])
async def test_a_patience_that_cannot_be_meant_is_refused(given: Any) -> None:
    async with ScriptedPeer() as peer:
        for wait in (peer.wait_connected, peer.wait_left):
            with pytest.raises((TypeError, ValueError), match=f"within {NO_DURATION}"):
                await wait(within=given)
        with pytest.raises((TypeError, ValueError), match=f"within {NO_DURATION}"):
            await peer.expect("query-status", within=given)
        with pytest.raises((TypeError, ValueError), match=f"within {NO_DURATION}"):
            await peer.wait_for("query-status", within=given)
    with pytest.raises((TypeError, ValueError), match=f"timeout {NO_DURATION}"):
        await MicroGuest().wait_ready(timeout=given)
    with pytest.raises((TypeError, ValueError), match=f"timeout {NO_DURATION}"):
        LinuxGuest(timeout=given)
    with pytest.raises((TypeError, ValueError), match=f"timeout {NO_DURATION}"):
        await probe_accelerator(given, timeout=given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_vcpus": "8"}, "max_vcpus is a whole number"),
        ({"ready_after_ms": 0.5}, "ready_after_ms is a whole number"),
        ({"qmp_sockets": True}, "qmp_sockets is a whole number"),
        ({"wait": "no"}, "wait is True or False"),
        ({"machine": 35}, "machine is text"),
    ],
)
def test_a_guest_that_cannot_be_meant_is_not_started(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        MicroGuest(**options)
