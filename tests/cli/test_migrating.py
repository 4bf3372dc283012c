from pathlib import Path

import pytest

from qmpvcpu.model.exported import ExportedState
from qmpvcpu.testing import MicroGuest, best_qemu
from tests.cli.running import run, said
from tests.migration.moving import move, save

pytestmark = pytest.mark.qemu


async def test_a_script_moves_a_vm_with_holes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "vm.json"
    async with (
        MicroGuest() as source,
        MicroGuest(best_qemu(), accel=source.accelerator, incoming=True) as target,
    ):
        here, there = ("--qmp", source.qmp), ("--qmp", target.qmp)
        assert (await said(capsys, "set", "0,3,6", *here)).code == 0
        assert (await said(capsys, "export", "-o", state, *here)).code == 0
        printed = await said(capsys, "export", *here)
        for exported in (printed.out, state.read_text()):
            assert ExportedState.from_json(exported).enabled == {0, 3, 6}
        wrong = await said(capsys, "check-target", state, "--json", *there)
        assert wrong.code == 1
        assert [(each["kind"], each["ids"]) for each in wrong.document["differences"]] == [("missing_vcpu", "3,6")]
        assert (await said(capsys, "check-target", state, "--accept", "missing-vcpu", *there)).code == 0
        for vcpu in ("6", "3"):
            assert (await said(capsys, "plug", vcpu, *there)).code == 0
        right = await said(capsys, "check-target", state, "--json", *there)
        assert (right.code, [each["kind"] for each in right.document["notes"]]) == (0, ["order"])
        early = await said(capsys, "confirm-target", state, "--timeout", "0", "--json", *there)
        assert (early.code, early.error["kind"]) == (3, "TargetLostError")
        assert "then qmpvcpu take-back --destination-is-gone on the source" in early.error["message"]
        assert await move(source, target) == "completed"
        arrived = await said(capsys, "confirm-target", state, "--source", source.qmp, *there)
        assert arrived.code == 0
        assert "has arrived: [0][ ][ ][3]" in arrived.out
        assert (await said(capsys, "unplug", "6", *there)).code == 0


async def test_a_vm_that_did_not_arrive_is_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with MicroGuest() as source:
        here = ("--qmp", source.qmp)
        state = tmp_path / "vm.json"
        assert (await said(capsys, "export", "-o", state, "--json", *here)).document["output"] == str(state)
        running = await said(capsys, "take-back", "--destination-is-gone", "--json", *here)
        assert (running.code, running.error["kind"]) == (1, "TakeBackError")
        await save(source, Path("/dev/null"))
        assert (await said(capsys, "export", "--json", *here)).error["reason"] == "migrated_away"
        assert (await said(capsys, "take-back", *here)).code == 2
        assert (await said(capsys, "take-back", "--destination-is-gone", *here)).code == 0
        assert (await said(capsys, "plug", "1", *here)).code == 0


async def test_what_is_no_export_is_bad_input(tmp_path: Path) -> None:
    state = tmp_path / "vm.json"
    state.write_text('{"schema": "another/1"}')
    ran = await run("check-target", state, "--json", "--qmp", tmp_path / "vm.qmp")
    assert (ran.code, "no export" in ran.error["message"]) == (2, True)
    ran = await run("check-target", state, "--accept", "colour", "--json", "--qmp", tmp_path / "vm.qmp")
    assert (ran.code, "qemu-version" in ran.error["message"]) == (2, True)
