"""Domain documents, right and wrong: each of their parts is drawn right, or, for some, wrong."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hypothesis import strategies as st

NAME = "generated"
UUID = "0d5c9f0e-6f6d-4d0e-8f3a-0a4b1e0c7a11"
Draw = st.DrawFn

CPUSETS = ["0", "0-1", " 0 - 1 ", "0,", "1,^1,0", "0-3,^1", "^0,1", "0,0-1,1", "007", "1 ,0, ", "5-5", "16383"]
BAD_CPUSETS = [
    "",
    " ",
    ",",
    "0-",
    "3-0",
    "0,^0",
    "^1",
    "16384",
    "-1",
    "x",
    "0,,1",
    "0-3,^0-1",
    "^ 1,0",
    "0;1",
    "+1",
    "1-2-3",
]
BAD_NUMBERS = ["", "x", "-1", "1 ", "0x1", "1.0", "4294967296", "99999999999999999999", "- 1", "1 1"]
ODD_UNITS = ["KiB", "k", "K", "kib", "KB", "", "b", "bytes", "MiB", "m", "MB"]
FEATURES = ["vmx", "pcid", "x2apic"]
LEVELS = ("sockets", "dies", "cores", "threads")
SCHEDULERS: list[dict[str, object]] = [
    {"scheduler": "batch"},
    {"scheduler": "fifo", "priority": 1},
    {"scheduler": "batch", "priority": 7},
    {"scheduler": "rr", "priority": -500},
]


@dataclass(frozen=True)
class Machine:
    """A machine type, the QEMU that has it, and how many vCPUs it takes."""

    name: str
    emulator: str
    limit: int


def attributes(pairs: Iterable[tuple[str, object]]) -> str:
    """Return attributes as text; those that are None are left out."""
    return "".join(f" {name}='{value}'" for name, value in pairs if value is not None)


def vcpu(draw: Draw, count: str, most: int, *, wrong: bool) -> str:
    """Draw ``<vcpu>``."""
    current = draw(st.none() | st.integers(1, most).map(str))
    cpuset = draw(st.none() | st.sampled_from(CPUSETS))
    placement = draw(st.sampled_from([None, None, "static", "auto"]))
    if wrong:
        which = draw(st.sampled_from(["current", "cpuset", "placement"]))
        if which == "current":
            bad = [["0"], [str(most + 1), str(most + 9)], BAD_NUMBERS]
            current = draw(st.sampled_from(draw(st.sampled_from(bad))))
        elif which == "cpuset":
            cpuset = draw(st.sampled_from(BAD_CPUSETS))
        else:
            placement = draw(st.sampled_from(["", "Auto", "numad"]))
    given = attributes([("placement", placement), ("cpuset", cpuset), ("current", current)])
    return f"<vcpu{given}>{count}</vcpu>"


def rows(draw: Draw, most: int, *, wrong: bool) -> str:
    """Draw ``<vcpus>``, or none."""
    made = _any_rows(draw, most) if wrong else _right_rows(draw, most)
    return f"<vcpus>{''.join(f'<vcpu{attributes(row.items())}/>' for row in made)}</vcpus>" if made else ""


def _right_rows(draw: Draw, most: int) -> list[dict[str, object]]:
    if draw(st.booleans()):
        return []
    started = draw(st.integers(1, most))
    made: list[dict[str, object]] = []
    for number in range(most):
        on = number < started or draw(st.booleans())
        said = draw(st.booleans())
        hotpluggable = "no" if number < started else "yes"
        if on or draw(st.booleans()):
            text = draw(st.sampled_from([f"{number}", f"+{number}", f" 0{number}"]))
            made.append({"id": text, "enabled": "yes" if on else "no"})
            # What is on without a word is started with.
            if said or (on and number >= started):
                made[-1]["hotpluggable"] = hotpluggable
    if draw(st.booleans()):
        late = draw(st.permutations([row for row in made if row["enabled"] == "yes"][started:]))
        # Those that are started with stand first.
        for place, each in enumerate([*made[:started], *late], start=1):
            each["order"] = place
    made = draw(st.permutations(made))
    if draw(st.booleans()):
        made.insert(0, {"id": 0, "enabled": "no"})  # the last one counts
    return made


def _any_rows(draw: Draw, most: int) -> list[dict[str, object]]:
    truth = st.sampled_from(["yes", "yes", "yes", "no"])
    if draw(st.integers(0, 3)) == 0:
        bad = st.sampled_from(["YES", "", "true", *BAD_NUMBERS])
        row: dict[str, object] = {"id": 0, "enabled": "yes", "hotpluggable": "no", "order": 1}
        key = draw(st.sampled_from(list(row)))
        row[key] = draw(bad | st.none()) if key in {"id", "enabled"} else draw(bad)
        return [row]
    return [
        {
            "id": draw(st.sampled_from([number] * 8 + [most, 0])),
            "enabled": draw(truth),
            "hotpluggable": draw(st.sampled_from(["yes", "no", "no", None])),
            "order": draw(st.sampled_from([None, None, 1, number + 1, number + 1, 2, most, most + 1])),
        }
        for number in range(draw(st.integers(1, 4)))
    ]


def cputune(draw: Draw, most: int, *, wrong: bool) -> str:
    """Draw ``<cputune>``, or none."""
    made = []
    ids = draw(st.lists(st.integers(0, most + 1), unique=True, max_size=3))
    made += [f"<vcpupin vcpu='{each}' cpuset='{draw(st.sampled_from(CPUSETS))}'/>" for each in ids]
    if draw(st.booleans()):
        made.append(f"<emulatorpin cpuset='{draw(st.sampled_from(CPUSETS))}'/>")
    made += [f"<vcpusched{attributes(each.items())}/>" for each in _scheds(draw, most)]
    if draw(st.booleans()):
        made.append(f"<emulatorsched{attributes(draw(st.sampled_from(SCHEDULERS)).items())}/>")
    if draw(st.booleans()):
        made.append("<shares>0</shares><period>1000</period><quota>-1</quota>")
    if wrong or draw(st.booleans()):
        made += _groups(draw, most, wrong=wrong)
    if wrong:
        made.append(draw(st.sampled_from(draw(st.sampled_from(_bad_tunes(most))))))
    made = draw(st.permutations(made))
    return f"<cputune>{''.join(made)}</cputune>" if made else ""


def _scheds(draw: Draw, most: int) -> list[dict[str, object]]:
    half = most // 2
    parts = [f"0-{half - 1}", f"{half}-{most - 1}"] if half else ["0"]
    return [{"vcpus": each, **draw(st.sampled_from(SCHEDULERS))} for each in parts if draw(st.booleans())]


def _groups(draw: Draw, most: int, *, wrong: bool) -> list[str]:
    """Draw which vCPUs share what."""
    cache = "<cache id='0' level='3' type='both' size='3' unit='MiB'/>"
    bandwidth = "<node id='0' bandwidth='60'/>"
    if not wrong:  # only what does not count: this is no domain of KVM's
        nothing: list[list[str]] = [[], [f"<cachetune vcpus='{most}'>{cache}</cachetune>", "<memorytune vcpus='0'/>"]]
        return draw(st.sampled_from(nothing))
    sets = st.sampled_from(["0", "0-1", f"{most - 1}", f"{most}", "0,^0"])
    kinds = st.sampled_from([("cachetune", cache), ("cachetune", ""), ("memorytune", bandwidth), ("memorytune", "")])
    drawn = draw(st.lists(st.tuples(kinds, sets), max_size=2))
    return [f"<{tag} vcpus='{vcpus}'>{inside}</{tag}>" for (tag, inside), vcpus in drawn]


def numatune(draw: Draw, cells: int, *, wrong: bool) -> str:
    """Draw ``<numatune>``, or none, for a domain that has so many cells."""
    nodeset = draw(st.sampled_from(["0", "0-1", *([None, "", "x", "0,^0"] if wrong else [])]))
    placement = draw(st.sampled_from([None, "static", "auto", *(["", "numad"] if wrong else [])]))
    mode = draw(st.sampled_from([None, "strict", "interleave", "restrictive", *(["default"] if wrong else [])]))
    made = [f"<memory{attributes([('mode', mode), ('placement', placement), ('nodeset', nodeset)])}/>"]
    if not draw(st.integers(0, 2)):
        made.clear()
    for each in range(draw(st.integers(0, cells)) if wrong or (made and placement != "auto") else 0):
        number = draw(st.sampled_from([each, 0, 7, None] if wrong else [each]))
        nodes = draw(st.sampled_from(["0", "0", None, "x"] if wrong else ["0"]))
        said = draw(st.sampled_from([None, "strict", mode])) if wrong else mode
        made.append(f"<memnode{attributes([('cellid', number), ('mode', said), ('nodeset', nodes)])}/>")
    return f"<numatune>{''.join(made)}</numatune>" if draw(st.booleans()) or made else ""


def _bad_tunes(most: int) -> list[list[str]]:
    """Return what libvirt refuses, by kind: each is to be drawn as often as the others."""
    return [
        [f"<vcpupin vcpu='0' cpuset='{each}'/>" for each in BAD_CPUSETS],
        [
            "<vcpupin vcpu='0' cpuset='1,^1'/>",
            "<emulatorpin cpuset='1,^1'/>",
            "<vcpusched vcpus='^1' scheduler='rr'/>",
        ],
        [f"<vcpupin vcpu='{each}' cpuset='0'/>" for each in BAD_NUMBERS],
        ["<vcpupin vcpu='0'/>", "<emulatorpin/>"],
        ["<vcpupin cpuset='0'/>", "<vcpusched scheduler='idle'/>", "<vcpusched vcpus='0'/>"],
        ["<vcpupin vcpu='0' cpuset='0'/><vcpupin vcpu='0' cpuset='0'/>"],
        ["<emulatorpin cpuset='0'/><emulatorpin cpuset='1'/>"],
        [f"<vcpusched vcpus='{each}' scheduler='idle'/>" for each in BAD_CPUSETS],
        ["<vcpusched vcpus='0' scheduler='other'/>", "<vcpusched vcpus='0' scheduler=''/>"],
        ["<vcpusched vcpus='0' scheduler='rr'/>"],
        [f"<vcpusched vcpus='0' scheduler='rr' priority='{each}'/>" for each in ("x", "2147483648", "")],
        [f"<vcpusched vcpus='{each}' scheduler='idle'/>" for each in (most, f"0-{most}")],
        ["<vcpusched vcpus='0' scheduler='idle'/><vcpusched vcpus='0' scheduler='batch'/>"],
        ["<emulatorsched scheduler='idle'/><emulatorsched scheduler='fifo' priority='1'/>", "<emulatorsched/>"],
        [f"<emulatorsched scheduler='{each}'/>" for each in ("other", "none", "rr", "")],
        [f"<emulatorsched scheduler='fifo' priority='{each}'/>" for each in ("x", "-2147483649", "")],
        [f"<{each}_period>{number}</{each}_period>" for each in ("global", "emulator") for number in (999, 1000001)],
        [f"<{each}>{number}</{each}>" for each in ("quota", "global_quota") for number in (1, 17592186044416)],
        ["<shares>1</shares>"],
        [f"<{tag}{vcpus}/>" for tag in ("cachetune", "memorytune") for vcpus in ("", " vcpus=''", " vcpus='x'")],
        ["<iothread_period>x</iothread_period>", "<emulator_quota>1.5</emulator_quota>", "<shares>-2</shares>"],
    ]


def cpu(draw: Draw, most: int, *, wrong: str | None) -> str:
    """Draw ``<cpu>``, or none; *wrong* names the part of it that is."""
    parts = [
        _topology(draw, most, wrong=wrong == "topology"),
        _numa(draw, most, wrong=wrong == "numa"),
    ]
    mode, migratable, model, features = _model(draw, wrong=wrong == "model")
    given = attributes([("mode", mode), ("migratable", migratable)])
    inner = f"{model}{features}{''.join(draw(st.permutations(parts)))}"
    return f"<cpu{given}>{inner}</cpu>" if given or inner or draw(st.booleans()) else ""


def _model(draw: Draw, *, wrong: bool) -> tuple[str | None, str | None, str, str]:
    mode = draw(st.sampled_from([None, "custom", "host-passthrough", "maximum", "host-model"]))
    migratable = draw(st.sampled_from([None, "on", "off"])) if mode in {"host-passthrough", "maximum"} else None
    named = draw(st.booleans())
    model = "<model>qemu64</model>" if named else ""
    names = draw(st.lists(st.sampled_from(FEATURES), unique=True, max_size=2))
    if mode in {None, "custom"} and not named:
        names = []
    policies = st.sampled_from([None, "force", "require", "optional", "disable", "forbid"])
    features = [f"<feature{attributes([('policy', draw(policies)), ('name', each)])}/>" for each in names]
    if wrong:
        return draw(
            st.sampled_from(
                [
                    ("Custom", None, "", ""),
                    ("custom", "on", "", ""),
                    ("maximum", "yes", "", ""),
                    (None, None, "", "<feature name='vmx'/>"),
                    ("custom", None, "<model>qemu64</model>", "<feature name='vmx' policy='no'/>"),
                    ("custom", None, "<model>qemu64</model>", "<feature policy='disable'/>"),
                    ("maximum", None, "", "<feature name='vmx'/><feature name='vmx'/>"),
                ]
            )
        )
    return mode, migratable, model, "".join(features)


def _topology(draw: Draw, most: int, *, wrong: bool) -> str:
    if not wrong and draw(st.booleans()):
        return ""
    levels: dict[str, object] = {}
    rest = most
    for level in LEVELS[:-1]:
        levels[level] = draw(st.sampled_from([each for each in range(1, rest + 1) if rest % each == 0]))
        rest //= int(str(levels[level]))
    levels["threads"] = rest
    if wrong:
        levels[draw(st.sampled_from(LEVELS))] = draw(
            st.sampled_from([None, 0, most + 1, 65536, 4294967295, *BAD_NUMBERS])
        )
    elif levels["dies"] == 1 and draw(st.booleans()):
        del levels["dies"]
    return f"<topology{attributes(levels.items())}/>"


def _numa(draw: Draw, most: int, *, wrong: bool) -> str:
    if not wrong and draw(st.booleans()):
        return ""
    cells = draw(st.integers(1, 3))
    members: list[list[int]] = [[] for _ in range(cells)]
    for number in range(most):
        cell = draw(st.integers(-1, cells - 1))
        if cell >= 0:  # else in none, which is the first
            members[cell].append(number)
    made: list[dict[str, object]] = [
        {
            "id": number,
            "cpus": ",".join(map(str, cpus)) or None,
            "memory": draw(st.sampled_from([4096, "8192", "+4096", 5000])),
            "unit": draw(st.sampled_from([None, *ODD_UNITS])),
        }
        for number, cpus in enumerate(members)
    ]
    if wrong:
        _spoil(draw, made, most)
    elif draw(st.booleans()):
        for each in made:
            del each["id"]
    else:
        made = draw(st.permutations(made))
    return f"<numa>{''.join(_cell(draw, cell, place, cells, wrong=wrong) for place, cell in enumerate(made))}</numa>"


def _cell(draw: Draw, cell: dict[str, object], place: int, cells: int, *, wrong: bool) -> str:
    """Draw what else a cell says, which libvirt reads after its memory."""
    access = draw(st.sampled_from([None, None, None, "shared", *(["", "x"] if wrong else [])]))
    discard = draw(st.sampled_from([None, None, None, "yes", *(["on"] if wrong else [])]))
    given = attributes([*cell.items(), ("memAccess", access), ("discard", discard)])
    if draw(st.integers(0, 2)):
        return f"<cell{given}/>"
    # Right ones: a wrong distance costs libvirtd 9.0.0 its life, sooner or later.
    others = [each for each in range(cells) if each != cell.get("id", place)]
    inside = "".join(f"<sibling id='{each}' value='{draw(st.sampled_from([21, 255]))}'/>" for each in others)
    return f"<cell{given}><distances>{inside}</distances></cell>" if inside else f"<cell{given}/>"


def _spoil(draw: Draw, cells: list[dict[str, object]], most: int) -> None:
    cell = draw(st.sampled_from(cells))
    key = draw(st.sampled_from(["id", "cpus", "cpus", "memory", "unit", "none"]))
    if key == "none":
        cells.clear()
    elif key == "id":
        bad_ids: list[list[object]] = [
            [(each + 1) % len(cells) for each in range(len(cells))],
            [len(cells)],
            [*BAD_NUMBERS],
        ]
        cell["id"] = draw(st.sampled_from(draw(st.sampled_from(bad_ids))))
    elif key == "cpus":
        bad = [each for each in BAD_CPUSETS if each not in {"0,^0", "^1"}]  # an empty cell may be
        beyond = [f"0-{most}", str(most), f"0-{most - 1}"]
        cell["cpus"] = draw(st.sampled_from(draw(st.sampled_from([*([each] for each in beyond), bad]))))
    elif key == "memory":
        cell["memory"] = draw(st.sampled_from([None, "", "x", "-1", "4096 "]))
    else:
        cell["unit"] = draw(st.sampled_from(["x", "Mi", " K"]))


def memory(draw: Draw, *, wrong: bool) -> str:
    """Draw ``<memory>``."""
    if wrong:
        return draw(
            st.sampled_from(
                [
                    "<memory>x</memory>",
                    "<memory> 65536 </memory>",
                    "<memory unit='x'>65536</memory>",
                    "<memory unit='EiB'>8</memory>",
                    "<memory>9007199254740992</memory>",
                    "<memory>-1</memory>",
                ]
            )
        )
    unit = draw(st.sampled_from([None, *ODD_UNITS]))
    return f"<memory{attributes([('unit', unit)])}>{draw(st.integers(5000, 65536))}</memory>"


def count(draw: Draw, machine: Machine, *, wrong: bool) -> tuple[str, int]:
    """Draw the text of ``<vcpu>``, and the number that the other parts shall fit."""
    if wrong:
        texts = ["0", "", "x", " 4", "4 ", "0x4", "4.0", "4294967296", "99999999999999999999", "-4294967297"]
        return draw(st.sampled_from([*texts, str(machine.limit + 1), "256", "5000"])), 4
    most = draw(st.sampled_from([1, 2, 3, 4, 4, 6, 8, 8, 12, 16]))
    return draw(st.sampled_from([f"{most}", f"{most}", f"+{most}", f"0{most}"])), most


PARTS = ("count", "vcpu", "rows", "rows", "cputune", "numatune", "topology", "numa", "model", "memory")
NO_DEVICES = "<controller type='usb' model='none'/><memballoon model='none'/>"


def document(machine: Machine, parts: Iterable[str], *, memory: str = "<memory>4096</memory>") -> bytes:
    """Return a domain of these parts."""
    return (
        f"<domain type='qemu'><name>{NAME}</name><uuid>{UUID}</uuid>{memory}\n"
        f"<os><type arch='x86_64' machine='{machine.name}'>hvm</type></os><features><acpi/></features>\n"
        + "\n".join(parts)
        + f"\n<devices><emulator>{machine.emulator}</emulator>{NO_DEVICES}</devices></domain>\n"
    ).encode()


def any_document(machines: list[Machine]) -> st.SearchStrategy[bytes]:
    """Documents with no part, one or two that are drawn to be wrong."""

    @st.composite
    def draw_document(draw: Draw) -> bytes:
        machine = draw(st.sampled_from(machines))
        wrong = set(draw(st.lists(st.sampled_from(PARTS), max_size=2)))
        text, most = count(draw, machine, wrong="count" in wrong)
        parts = [
            vcpu(draw, text, most, wrong="vcpu" in wrong),
            rows(draw, most, wrong="rows" in wrong),
            cputune(draw, most, wrong="cputune" in wrong),
            cpu(draw, most, wrong=next((each for each in ("topology", "numa", "model") if each in wrong), None)),
        ]
        parts.append(numatune(draw, parts[-1].count("<cell "), wrong="numatune" in wrong))
        return document(machine, draw(st.permutations(parts)), memory=memory(draw, wrong="memory" in wrong))

    return draw_document()


def documents_with_three_vcpus(machines: list[Machine]) -> Iterator[bytes]:
    """Every ``<vcpus>`` of three vCPUs, right or wrong, on one machine after the other."""
    first = itertools.product(("yes",), ("no", None), (1, None))
    others = list(itertools.product(("yes", "no"), ("yes", "no", None), (1, 2, 3, 4, None)))
    for place, made in enumerate(itertools.product(first, others, others)):
        inner = "".join(
            f"<vcpu id='{number}'{attributes(zip(('enabled', 'hotpluggable', 'order'), row, strict=True))}/>"
            for number, row in enumerate(made)
        )
        yield document(machines[place % len(machines)], ["<vcpu>3</vcpu>", f"<vcpus>{inner}</vcpus>"])
