"""The manual's diagrams, drawn from what they show: ``python -m tests.docs.diagrams`` draws them anew.

`removal.svg` is the engine's own table of one removal. `plug.svg`, `unplug.svg` and `refusal.svg` are what a recorded
QEMU and its guest said (`fixtures/captures`), between a caller and qmpvcpu. `revert.svg` is what the engine does when
it is run.
"""

import json
import textwrap
from collections import defaultdict
from typing import Any, NamedTuple

from qmpvcpu import OnFailure
from qmpvcpu.engine.removal import TRANSITIONS, Evidence, State
from tests.docs.blocks import ROOT
from tests.docs.svg import Drawing
from tests.engine.story import Story

IMAGES = ROOT / "docs" / "images"

# --- one removal --------------------------------------------------------------------------------------------------

_BOX = (166, 100)
_LIVE = {State.SENT: 236, State.REQUESTED: 480, State.WORKING: 724}  # from left to right, with their middles
_MIDDLE = 265
_BARS = {  # what ends it, with the middle of its bar and where its arrows stand beside the middle of a box
    State.UNPLUGGED: (58, -45, "good"),
    State.REFUSED: (470, -45, "bad"),
    State.UNKNOWN: (585, 35, "doubt"),
}
_REJECTED = 64
_TONE = {State.REJECTED: "bad"} | {state: tone for state, (_, _, tone) in _BARS.items()}


def removal() -> Drawing:
    """Draw the table of one removal: a pair that changes the state is an arrow, the others stand in its box."""
    drawing = Drawing(830, 635, "One removal, from device_del to its answer")
    arrows: dict[tuple[State, State], list[str]] = defaultdict(list)
    stays: dict[State, list[str]] = defaultdict(list)
    for (before, evidence), after in TRANSITIONS.items():
        (stays[before] if before is after else arrows[before, after]).append(evidence.name)
    _arrows_to_bar(drawing, arrows, State.UNKNOWN)  # they pass behind the bar above theirs
    for state, (y, _, tone) in _BARS.items():
        drawing.box(153, y - 34, 654, 68, tone)
        _words(drawing, 480, y, state, stays[state])
    for state in (State.UNPLUGGED, State.REFUSED):
        _arrows_to_bar(drawing, arrows, state)
    for state, x in {**_LIVE, State.REJECTED: _REJECTED}.items():
        width, height = _BOX if state in _LIVE else (106, _BOX[1])
        drawing.box(x - width / 2, _MIDDLE - height / 2, width, height, _TONE.get(state, "plain"))
        _words(drawing, x, _MIDDLE, state, stays[state])
    for (before, after), names in arrows.items():
        if after in _LIVE or after is State.REJECTED:
            _arrow_between(drawing, before, after, ", ".join(names))
    return drawing


_SHORT = {  # what a box has room for
    State.SENT: "no reply of QEMU yet",
    State.REQUESTED: "the guest has not reacted",
    State.WORKING: "the guest works on it",
    State.REJECTED: "QEMU said error",
}


def _words(drawing: Drawing, x: float, y: float, state: State, stays: list[str]) -> None:
    lines = textwrap.wrap(f"unmoved by {', '.join(stays)}", 24 if state in _LIVE else 99) if stays else []
    top = y - 14 - 7 * max(0, len(lines) - 1)
    drawing.text(x, top, state.name, f"strong {_TONE.get(state, 'plain')}-ink")
    drawing.text(x, top + 17, _SHORT.get(state, state.value), "small")
    for number, line in enumerate(lines):
        drawing.text(x, top + 33 + 14 * number, line, "small faint")


def _arrows_to_bar(drawing: Drawing, arrows: dict[tuple[State, State], list[str]], bar: State) -> None:
    y, beside, tone = _BARS[bar]
    for state, x in _LIVE.items():
        if names := arrows.get((state, bar)):
            start, end = (_MIDDLE - _BOX[1] / 2, y + 36) if y < _MIDDLE else (_MIDDLE + _BOX[1] / 2, y - 36)
            drawing.arrow(f"M{x + beside:g} {start:g}V{end:g}", tone)
            at = end + 30 if y < _MIDDLE else start + (45 if bar is State.UNKNOWN else 60)
            drawing.text(x + beside + 7, at + 4, ", ".join(names), f"small {tone}-ink", "start")


def _arrow_between(drawing: Drawing, before: State, after: State, names: str) -> None:
    start = _LIVE[before]
    if after is State.REJECTED:
        drawing.arrow(f"M{start - _BOX[0] / 2:g} {_MIDDLE}H{_REJECTED + 55:g}", "bad")
        drawing.text(_REJECTED + 45, _MIDDLE - 58, names, "small bad-ink")
        return
    end = _LIVE[after]
    half = _BOX[0] / 2
    order = list(_LIVE)
    if abs(order.index(before) - order.index(after)) > 1:
        top = _MIDDLE - _BOX[1] / 2
        high = top - 75
        drawing.arrow(f"M{start + 40:g} {top:g}C{start + 110:g} {high:g} {end - 130:g} {high:g} {end - 62:g} {top:g}")
        drawing.text((start + end) / 2 + 98, top - 53, names, "small plain-ink")
    elif start < end:
        drawing.arrow(f"M{start + half:g} {_MIDDLE - 14}H{end - half - 2:g}")
        drawing.text((start + end) / 2, _MIDDLE - 22, names, "small plain-ink")
    else:
        drawing.arrow(f"M{start - half:g} {_MIDDLE + 16}H{end + half + 2:g}", "doubt")
        drawing.text((start + end) / 2, _MIDDLE + 32, names, "small doubt-ink")


# --- who says what to whom ----------------------------------------------------------------------------------------


class Said(NamedTuple):
    """One arrow of a sequence.

    Attributes:
        who: Who says it.
        to: To whom.
        words: What.
        wire: What of it stands in the recording, in the order there: a command, ``return``, or an event; "" if none.
        tone: good, bad, doubt or plain.
    """

    who: str
    to: str
    words: str
    wire: str = ""
    tone: str = "plain"


CALLER, US, QEMU, GUEST = "your program", "qmpvcpu", "QEMU", "guest"
_COLUMNS = {CALLER: 78, US: 304, QEMU: 608, GUEST: 800}


class Sequence(NamedTuple):
    """A sequence, and the recording that it is checked against.

    Attributes:
        title: What it shows.
        capture: The recording's file.
        device: The id that the device has there.
        said: From top to bottom.
    """

    title: str
    capture: str
    device: str
    said: tuple[Said, ...]


_KVM = "10.0.2-wire-q35-kvm-microguest"
SEQUENCES = {
    "plug": Sequence(
        "A plug: the vCPU is there when QEMU says so; what the guest makes of it comes later",
        f"{_KVM}-plug-unplug",
        "c2",
        (
            Said(CALLER, US, "await vm.plug(3)"),
            Said(US, US, "may it be sent? else StepDeniedError"),
            Said(US, QEMU, "device_add id=vcpu3, its slot's place", "device_add"),
            Said(QEMU, GUEST, "interrupt: look at slot 3"),
            Said(QEMU, US, "return {}: the thread is there", "return"),
            Said(US, CALLER, "VcpuMap('3'), VcpuPlugged", "", "good"),
            Said(GUEST, QEMU, "takes the CPU, evaluates _OST"),
            Said(QEMU, US, "ACPI_DEVICE_OST: source 1, status 0", "ACPI_DEVICE_OST 1/0"),
            Said(US, CALLER, "Proof.ACKNOWLEDGED: done", "", "good"),
            Said(GUEST, GUEST, "brings it online, later"),
        ),
    ),
    "unplug": Sequence(
        "An unplug: the guest decides, and only QEMU's word that this very CPU is gone counts",
        f"{_KVM}-plug-unplug",
        "c2",
        (
            Said(CALLER, US, "await vm.unplug(3, timeout=30)"),
            Said(US, QEMU, "device_del id=vcpu3", "device_del"),
            Said(QEMU, GUEST, "interrupt: eject slot 3"),
            Said(QEMU, US, "return {}: the request is taken, no more", "return"),
            Said(US, CALLER, "UnplugRequested", "", "doubt"),
            Said(GUEST, QEMU, "begins: _OST in progress"),
            Said(QEMU, US, "ACPI_DEVICE_OST: source 3, status 0x84", "ACPI_DEVICE_OST 3/132"),
            Said(US, CALLER, "UnplugAcknowledged: pending", "", "doubt"),
            Said(GUEST, GUEST, "takes it offline"),
            Said(GUEST, QEMU, "_EJ0: ejects"),
            Said(QEMU, US, "DEVICE_DELETED …/vcpu3/lapic: not it", "DEVICE_DELETED lapic"),
            Said(QEMU, US, "DEVICE_DELETED …/vcpu3: the proof", "DEVICE_DELETED", "good"),
            Said(US, CALLER, "VcpuMap('3'), VcpuUnplugged", "", "good"),
            Said(QEMU, US, "ACPI_DEVICE_OST: status 0, proves nothing", "ACPI_DEVICE_OST 3/0"),
        ),
    ),
    "refusal": Sequence(
        "A refusal: heard at once, with its reason; the vCPU stays",
        f"{_KVM}-refuses-busy",
        "c2",
        (
            Said(CALLER, US, "await vm.unplug(3, timeout=30)"),
            Said(US, QEMU, "device_del id=vcpu3", "device_del"),
            Said(QEMU, GUEST, "interrupt: eject slot 3"),
            Said(QEMU, US, "return {}: the request is taken, no more", "return"),
            Said(GUEST, GUEST, "cannot let go of it"),
            Said(GUEST, QEMU, "_OST with the reason"),
            Said(QEMU, US, "ACPI_DEVICE_OST: source 3, status 0x82", "ACPI_DEVICE_OST 3/130", "bad"),
            Said(US, CALLER, "UnplugRefusedError: busy", "", "bad"),
        ),
    ),
}

_STEP = 38


def draw(title: str, told: tuple[Said, ...], columns: dict[str, int]) -> Drawing:
    """Draw who says what to whom, from top to bottom; *columns* are who, and where."""
    bottom = 96 + _STEP * len(told)
    drawing = Drawing(880, bottom + 10, title)
    drawing.text(440, 28, title, "strong")
    for who, x in columns.items():
        drawing.life_line(x, 82, bottom - 14)
        drawing.box(x - 70, 48, 140, 34)
        drawing.text(x, 70, who, "strong")
    for number, said in enumerate(told):
        y = 118 + _STEP * number
        start, end = columns[said.who], columns[said.to]
        if said.who == said.to:
            drawing.arrow(f"M{start} {y - 10}h22v14H{start + 3}", said.tone)
            side, anchor = (start + 30, "start") if said.who != GUEST else (start - 12, "end")
            drawing.text(side, y + 2, said.words, "small faint", anchor)
            continue
        drawing.arrow(f"M{start} {y}H{end - 3 if start < end else end + 3}", said.tone)
        ours = said.wire or GUEST not in (said.who, said.to)
        drawing.text((start + end) / 2, y - 7, said.words, "code" if ours else "small")
    return drawing


def recorded(sequence: Sequence) -> list[str]:
    """Return what the recording has of the device's plug or unplug, in the words of `Said.wire`."""
    wire = json.loads((ROOT / "fixtures" / "captures" / f"{sequence.capture}.json").read_text())["wire"]
    begin = next(said.wire for said in sequence.said if said.wire)
    found: list[str] = []
    slot, asked = "", 0
    for message in (each["msg"] for each in wire):
        if message.get("execute") == begin and message["arguments"]["id"] == sequence.device:
            found, asked = [begin], message["id"]
        elif asked and message.get("id") == asked and "return" in message:
            found.append("return")
        elif found and "event" in message:
            name, slot = _event(message, sequence.device, slot)
            found += [name] if name else []
        elif found and "execute" in message:
            break
    return found


def _event(message: dict[str, Any], device: str, slot: str) -> tuple[str, str]:
    data = message["data"]
    if message["event"] == "ACPI_DEVICE_OST":
        info = data["info"]
        if info.get("device") == device or info["slot"] == slot:
            return f"ACPI_DEVICE_OST {info['source']}/{info['status']}", info["slot"]
    elif data.get("path", "").startswith(f"/machine/peripheral/{device}"):
        return "DEVICE_DELETED lapic" if data["path"].endswith("/lapic") else "DEVICE_DELETED", slot
    return "", slot


# --- one transition -----------------------------------------------------------------------------------------------

RECORD = "record"
_REVERT = "A map under REVERT: what the engine has done, while the guest clings to vCPU 1"
_WITH_RECORD = {CALLER: 78, US: 322, RECORD: 540, QEMU: 800}
_EFFECTS = {  # of the engine, by the words of tests/engine/story.py
    "save intent": (RECORD, "the intent, fsync", "plain"),
    "save reverting": (RECORD, "it turns back, fsync", "doubt"),
    "save outcome": (RECORD, "what is so now", "plain"),
    "add": (QEMU, "device_add vcpu{}", "plain"),
    "del": (QEMU, "device_del {}", "plain"),
}


def reverted() -> tuple[Said, ...]:
    """Run the engine: 0-1,6 shall be 0,2, one vCPU refuses, and all is undone. Return who says what to whom."""
    told = Story("0-1,6", "0,2", on_failure=OnFailure.REVERT)
    said = [Said(CALLER, US, "set_map('0,2', ...REVERT)")]

    def then(effects: list[str]) -> None:
        for effect in effects:
            verb, _, vcpu = effect.partition(" ")
            to, words, tone = _EFFECTS.get(effect) or _EFFECTS[verb]
            said.append(Said(US, to, words.format(f"vcpu{vcpu}" if verb == "del" else vcpu), tone=tone))

    def answer(words: str, tone: str, effects: list[str]) -> None:
        said.append(Said(QEMU, US, words, tone=tone))
        then(effects)

    then(told.begun)
    answer("return {}: plugged", "good", told.accept(2))
    answer("return {} for both: requested", "plain", told.accept(6, 1))
    answer("DEVICE_DELETED vcpu6", "good", told.ejects(6))
    answer("ACPI_DEVICE_OST 0x82 for vCPU 1", "bad", told.refuses(1))
    answer("return {}: plugged again", "good", told.accept(6))
    answer("return {}: requested", "plain", told.accept(2))
    answer("DEVICE_DELETED vcpu2", "good", told.ejects(2))
    said.append(Said(US, CALLER, f"TransitionError: {told.outcome}", tone="bad"))
    return tuple(said)


def all_drawings() -> dict[str, Drawing]:
    """Return every diagram by the name of its file."""
    drawn = {"removal.svg": removal(), "revert.svg": draw(_REVERT, reverted(), _WITH_RECORD)}
    return drawn | {f"{name}.svg": draw(each.title, each.said, _COLUMNS) for name, each in SEQUENCES.items()}


def evidence_table() -> str:
    """Return the table of one removal as Markdown: a row for each state, a column for each evidence."""
    states = [state.name for state in State]
    lines = [
        "| in state | " + " | ".join(each.name for each in Evidence) + " |",
        "| --- " * (len(Evidence) + 1) + "|",
    ]
    for state in states:
        row = [TRANSITIONS.get((State[state], evidence)) for evidence in Evidence]
        lines.append(f"| `{state}` | " + " | ".join("" if each is None else each.name for each in row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for file, drawing in all_drawings().items():
        (IMAGES / file).write_text(str(drawing))
