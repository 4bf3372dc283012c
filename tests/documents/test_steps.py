"""What a plug, or an unplug, of single vCPUs is told as."""

from dataclasses import replace
from typing import Any

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.documents import plug_json, unplug_json
from qmpvcpu.errors import PlacementError, UnprovenError
from qmpvcpu.model.options import Proof
from qmpvcpu.model.transition import ProofSeconds
from qmpvcpu.model.verdicts import OstAnswer, Plugged, Refused, Unplugged, Verdict
from tests.cli.schema import errors_in
from tests.layouts import layout

VCPU_2 = VcpuMap([2])
TOLD: dict[str, Any] = {"seconds": 0.5, "proofs": ProofSeconds(present=0.25)}


def answered(code: int) -> Any:
    """A VM whose guest has answered the plug of vCPU 2 so."""
    plugged = layout("0-2")
    slots = [*plugged.slots]
    slots[2] = slots[2].answered(OstAnswer(source=0x200, code=code))
    return replace(plugged, slots=tuple(slots))


def test_a_plug_has_its_verdict_its_proofs_and_its_place() -> None:
    told = plug_json(answered(0), VCPU_2, **TOLD, placed=0.4)
    assert errors_in(told, "plugStep") == []
    assert told == {
        "verdict": {
            "kind": "plugged",
            "ids": "2",
            "acknowledged": True,
            "code": 0,
            "reason": "",
            "seconds": 0.5,
        },
        "proofs": {"present": 0.25, "acknowledged": None, "started": None, "online": None},
        "placed": 0.4,
        "unplaced": "",
        "taken_out": False,
    }


@pytest.mark.parametrize(
    ("wanted", "code", "acknowledged"),
    [(Proof.ACKNOWLEDGED, None, False), (Proof.STARTED, None, None), (Proof.STARTED, 0, True)],
)
def test_a_plug_without_its_proof_is_one_all_the_same(
    wanted: Proof, code: int | None, acknowledged: bool | None
) -> None:
    now = layout("0-2") if code is None else answered(code)
    error = UnprovenError(VCPU_2, wanted, Proof.PRESENT, "it is silent", code=code)
    told = plug_json(now, error, **TOLD)
    assert errors_in(told, "plugStep") == []
    verdict = Plugged(VCPU_2, acknowledged, code, "it is silent", 0.5)
    assert told["verdict"] == plug_verdict(verdict)


def plug_verdict(verdict: Plugged) -> Any:
    return unplug_json(verdict, joined=False)["verdict"]


@pytest.mark.parametrize("taken_out", [True, False, None])
def test_a_plug_out_of_its_place_says_why_and_whether_it_left(*, taken_out: bool | None) -> None:
    error = PlacementError(VCPU_2, "CPU 3 is offline", taken_out=taken_out)
    told = plug_json(layout("0-1"), error, **TOLD, unplaced="said before")
    assert errors_in(told, "plugStep") == []
    assert told["verdict"] == plug_verdict(Plugged(VCPU_2, seconds=0.5))
    assert (told["placed"], told["unplaced"], told["taken_out"]) == (None, "CPU 3 is offline", taken_out)


@pytest.mark.parametrize("verdict", [Unplugged(VCPU_2, 1.0), Refused(VCPU_2, 0x82, "device is busy")])
def test_an_unplug_has_its_verdict_and_whether_it_joined_another(verdict: Verdict) -> None:
    told = unplug_json(verdict, joined=True)
    assert errors_in(told, "unplugStep") == []
    assert (told["verdict"]["kind"], told["joined"]) == (verdict.name.lower(), True)
