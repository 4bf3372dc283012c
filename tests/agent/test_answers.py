import base64
from typing import Any

import pytest

from qmpvcpu.agent import answers
from qmpvcpu.agent.answers import NonsenseError
from qmpvcpu.model.guest import GuestCpu
from tests.agent.recorded import NAMES, exchanges
from tests.agent.recorded import answers as recorded


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_list_is_read_and_sorted(name: str) -> None:
    for answer in recorded(name, "guest-get-vcpus"):
        cpus = answers.parse_vcpus(answer["return"])
        assert [cpu.number for cpu in cpus] == sorted(entry["logical-id"] for entry in answer["return"])


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_agent_has_the_commands_that_we_need(name: str) -> None:
    (info,) = recorded(name, "guest-info")
    assert {"guest-get-vcpus", "guest-set-vcpus", "guest-file-open"} <= answers.parse_commands(info["return"])


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_change_tells_how_many_or_why_not(name: str) -> None:
    errnos = set()
    for exchange in exchanges(name):
        if exchange.command != "guest-set-vcpus":
            continue
        if "return" in exchange.answer:
            asked = exchange.arguments["vcpus"]
            assert answers.parse_count(exchange.answer["return"], len(asked)) in (len(asked), 1)
        else:
            said = answers.explain_error("guest-set-vcpus", exchange.answer["error"]["desc"])
            assert not answers.is_unsupported(**_error(exchange.answer))
            errnos.add((said.errno, said.number))
    assert {"EBUSY", "ENOENT"} <= {errno for errno, _ in errnos}
    assert ("ENOENT", 99) in errnos


def _error(answer: dict[str, Any]) -> dict[str, Any]:
    return {"error_class": answer["error"]["class"], "desc": answer["error"]["desc"]}


def test_what_a_refusal_means_is_said_in_words() -> None:
    busy = answers.explain_error(
        "guest-set-vcpus", 'pwrite("/sys/devices/system/cpu/cpu2//online"): Device or resource busy'
    )
    assert busy.errno == "EBUSY"
    assert busy.number == 2
    assert busy.reason.startswith("deadline tasks need this CPU")
    fixed = answers.explain_error("guest-set-vcpus", "logical processor #0 can't be offlined")
    assert (fixed.errno, fixed.number) == ("", 0)
    assert fixed.reason.startswith("its system does not let this CPU go offline")
    absent = answers.explain_error(
        "guest-file-open", "failed to open file '/x' (mode: 'r'): No such file or directory"
    )
    assert absent.errno == "ENOENT"
    assert absent.reason == "failed to open file '/x' (mode: 'r'): No such file or directory"
    strange = answers.explain_error("guest-set-vcpus", "\x1b[2Jno\nway" * 1000)
    assert strange.errno == ""
    assert strange.reason.isprintable()
    assert len(strange.reason) < 2000


@pytest.mark.parametrize(
    ("error_class", "desc", "forbidden", "unsupported"),
    [
        ("CommandNotFound", "Command guest-exec has been disabled", True, True),
        ("CommandNotFound", "Command guest-exec has been disabled: the command is not allowed", True, True),
        ("CommandNotFound", "The command guest-nosuch has not been found", False, True),
        ("GenericError", "this feature or command is not currently supported", False, True),
        ("GenericError", 'pwrite("/sys/...online"): Device or resource busy', False, False),
    ],
)
def test_a_command_that_is_forbidden_is_told_from_one_that_failed(
    error_class: str, desc: str, *, forbidden: bool, unsupported: bool
) -> None:
    assert answers.is_forbidden(error_class, desc) is forbidden
    assert answers.is_unsupported(error_class, desc) is unsupported


def cpu(number: Any, *, online: Any = True, **more: Any) -> dict[str, Any]:
    return {"logical-id": number, "online": online, **more}


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ({}, "no list"),
        ([], "no CPU"),
        ([cpu(1)], "does not list CPU 0"),
        ([cpu(0), cpu(1), cpu(1, online=False)], "CPU 1 twice"),
        ([cpu(0), cpu(-1)], "-1 is not a number from 0"),
        ([cpu(0), cpu(1 << 40)], "is not a number from 0"),
        ([cpu(0), cpu(number=True)], "true is not a number"),
        ([cpu(0), cpu(1.0)], "1.0 is not a number"),
        ([cpu(0), cpu("1")], "is not a number"),
        ([cpu(0), 7], "an entry is no object"),
        ([cpu(0, online="yes")], "not true or false"),
        ([cpu(0, **{"can-offline": 1})], "not true or false"),
        ([cpu(0, online=False)], "one of them answers"),
        ([cpu(each) for each in range(100_000)], "lists 100000 CPUs"),
    ],
)
def test_a_list_that_lies_is_refused(lie: Any, why: str) -> None:
    with pytest.raises(NonsenseError, match=why):
        answers.parse_vcpus(lie)


def test_an_agent_need_not_tell_whether_a_cpu_can_go() -> None:
    assert answers.parse_vcpus([cpu(0)]) == (GuestCpu(0, online=True, can_offline=True),)


@pytest.mark.parametrize("lie", [-1, 3, True, "2", None, 1.0])
def test_a_count_beyond_what_was_asked_is_refused(lie: Any) -> None:
    with pytest.raises(NonsenseError):
        answers.parse_count(lie, 2)


@pytest.mark.parametrize("lie", [-1, 1 << 63, True, "2", None, 1.0])
def test_a_handle_is_a_number_of_the_agents_size(lie: Any) -> None:
    assert answers.parse_handle(1000) == 1000
    with pytest.raises(NonsenseError):
        answers.parse_handle(lie)


@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"buf-b64": "!!!!", "eof": True},
        {"buf-b64": "QUJD", "eof": 1},
        {"buf-b64": base64.b64encode(bytes(11)).decode(), "eof": True},
        {"buf-b64": "A" * 10_000, "eof": True},
    ],
)
def test_a_piece_of_a_file_is_bounded(lie: Any) -> None:
    with pytest.raises(NonsenseError):
        answers.parse_read(lie, 10)


def test_a_system_is_described_by_what_the_agent_tells_of_it() -> None:
    told = {"id": "debian", "kernel-release": "6.1.0\x1b[31m", "machine": "x86_64", "version-id": "12"}
    found = answers.parse_osinfo(told)
    assert (found.id, found.name, found.kernel) == ("debian", "", "6.1.0\\x1b[31m")
    lies: list[Any] = [None, [], {"id": 3}]
    for lie in lies:
        with pytest.raises(NonsenseError):
            answers.parse_osinfo(lie)


@pytest.mark.parametrize("lie", [None, {"supported_commands": 3}, {"supported_commands": [{}]}])
def test_commands_that_are_no_list_are_refused(lie: Any) -> None:
    with pytest.raises(NonsenseError):
        answers.parse_commands(lie)


def is_open(port: answers.Port | None) -> bool | None:
    return None if port is None else port.is_open


def test_qemu_tells_whether_the_guest_has_the_port_open() -> None:
    chardevs = [
        {"frontend-open": True, "filename": "disconnected:unix:/run/qmp0,server=on", "label": "qmp0"},
        {"frontend-open": False, "filename": "unix:/run/ga.sock,server=on", "label": "ga"},
        {"label": "strange"},
        7,
    ]
    assert is_open(answers.parse_port(chardevs, "/run/ga.sock")) is False
    assert is_open(answers.parse_port(chardevs, "/run/qmp0")) is True
    assert answers.parse_port(chardevs, "/run/ga") is None
    assert is_open(answers.parse_port(chardevs, "/other/way/to/ga.sock")) is False
    relative = [{"frontend-open": True, "filename": "unix:agent,server=on", "label": "agent"}]
    assert is_open(answers.parse_port(relative, "/run/vm/agent")) is True
    assert answers.parse_port(relative * 2, "/run/vm/agent") is None
    assert answers.parse_port(None, "/run/ga") is None
    assert answers.parse_port(chardevs, "/run/ga.sock") == answers.Port(is_open=False, has_client=True)
    assert answers.parse_port(chardevs, "/run/qmp0") == answers.Port(is_open=True, has_client=False)
    tcp = [{"frontend-open": True, "filename": "tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:555", "label": "a"}]
    assert is_open(answers.parse_port(tcp, "tcp:127.0.0.1:4444")) is True
