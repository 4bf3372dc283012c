"""Commands that ask the guest's agent, and an agent that does not do its part."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.testing import Behaviour, MicroGuest, Mood, ScriptedAgent
from tests.cli.running import Ran, environment, run, running

pytestmark = pytest.mark.qemu


@pytest.fixture
async def agent(guest: MicroGuest) -> AsyncIterator[ScriptedAgent]:
    """An agent in the micro-guest, whose system finds a plugged vCPU and leaves it offline."""
    async with (
        qmpvcpu.attach(guest.sockets[1]) as vm,
        ScriptedAgent(vcpus=(0, 1), look=lambda: vm.layout.enabled) as agent,
    ):
        yield agent


async def ask(guest: MicroGuest, agent: ScriptedAgent, *words: str) -> Ran:
    return await run(*words, "--qmp", guest.qmp, "--agent", agent.path)


async def test_a_plug_is_proven_by_the_guests_own_list(guest: MicroGuest, agent: ScriptedAgent) -> None:
    ran = await ask(guest, agent, "plug", "3", "--proof", "online")
    assert ran.code == 0
    assert "plugged vCPU 3 as vcpu3 in" in ran.out
    assert "online in" in ran.out
    assert agent.is_online(3)
    document = (await ask(guest, agent, "plug", "4", "--proof", "online", "--json")).document
    assert 0 < document["steps"][0]["proofs"]["present"] < document["steps"][0]["proofs"]["online"]


async def test_a_plug_that_may_only_look_is_never_online_and_stays_plugged(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    ran = await ask(guest, agent, "plug", "3", "--proof", "online", "--no-online", "--timeout", "0.5", "--json")
    assert (ran.code, ran.error["kind"], ran.error["wanted"]) == (1, "UnprovenError", "online")
    assert ran.document["enabled"] == "0-1,3"
    assert ran.document["steps"][0]["proofs"]["present"] > 0
    assert agent.changes == []


async def test_a_map_tells_the_seconds_of_each_proof_and_which_is_missing(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    ran = await ask(guest, agent, "set", "0-2", "--proof", "online")
    assert ran.code == 0
    assert "proven" in ran.out
    assert "online in" in " ".join(ran.out.split())
    ran = await ask(guest, agent, "set", "0-3", "--proof", "online", "--no-online", "--timeout", "0.5")
    assert ran.code == 1
    assert "0-3 not reached (partial): 3 PLUGGED (never online)" in ran.err
    document = (await ask(guest, agent, "count", "5", "--proof", "online", "--json")).document
    assert document["steps"][0]["proofs"]["online"] > 0


async def test_an_unplug_that_the_guests_system_refuses_sends_nothing_to_qemu(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    await agent.turn(Mood.REFUSING)
    ran = await ask(guest, agent, "unplug", "1", "--offline-first", "--json")
    assert (ran.code, ran.error["kind"], ran.error["by_agent"]) == (1, "UnplugRefusedError", True)
    assert (ran.document["enabled"], ran.document["pending"]) == ("0-1", "")
    await agent.turn(Mood.NORMAL)
    ran = await ask(guest, agent, "unplug", "1", "--offline-first", "--verbose")
    assert ran.code == 0
    sent = next(line for line in ran.err.splitlines() if "guest-set-vcpus" in line)
    assert f" ms  unix:{agent.path} sent " in sent
    assert f"unix:{agent.path} received " in ran.err
    assert "device_del" in ran.err
    assert agent.changes == [(1, False)]


async def test_a_plan_says_where_the_agent_has_a_part(guest: MicroGuest, agent: ScriptedAgent) -> None:
    ran = await ask(guest, agent, "plan", "0", "--offline-first")
    assert ran.code == 0
    assert "taken offline in the guest by its agent" in ran.out
    assert agent.received == ["guest-get-osinfo"]


async def test_windows_is_asked_for_no_vcpu(guest: MicroGuest, agent: ScriptedAgent) -> None:
    agent.answers["guest-get-osinfo"] = {"id": "mswindows", "pretty-name": "Windows 11 Pro", "variant-id": "client"}
    for words in (["plan", "0"], ["set", "0"], ["count", "1", "--include-boot"], ["unplug", "1"]):
        ran = await ask(guest, agent, *words, "--json")
        assert ran.code == 2
        denied = ran.document["denied"][0] if words[0] == "plan" else ran.error
        assert denied["reason"] == "guest_cannot_unplug"
    shown = await ask(guest, agent, "plan", "0-2")
    assert "warning: Windows 11 Pro sees a new vCPU at its next boot" in shown.out


@pytest.mark.parametrize("words", [("plan", "0"), ("unplug", "1"), ("set", "0")])
async def test_an_agent_that_does_not_name_the_system_stops_nothing(
    guest: MicroGuest, agent: ScriptedAgent, words: tuple[str, ...]
) -> None:
    await agent.turn(Mood.SILENT)
    ran = await ask(guest, agent, *words, "--reply-timeout", "0.5")
    assert ran.code == 0


@pytest.mark.parametrize("words", [("set", "0", "--offline-first"), ("plug", "3", "--proof", "online")])
async def test_what_needs_an_agent_is_denied_without_one(guest: MicroGuest, words: tuple[str, ...]) -> None:
    ran = await run(*words, "--qmp", guest.qmp)
    assert ran.code == 2
    assert "name its socket with --agent ADDRESS" in ran.err
    assert "=" not in ran.err.partition("now:")[0]


async def test_a_list_says_which_vcpus_the_guest_uses(guest: MicroGuest, agent: ScriptedAgent) -> None:
    assert (await run("plug", "3", "--qmp", guest.qmp)).code == 0
    document = (await ask(guest, agent, "list", "--json")).document
    proofs = [vcpu["proof"] for vcpu in document["vcpus"][:4]]
    assert proofs == ["online", "online", None, "acknowledged"]
    assert document["vcpus"][0]["proven_at"] > 0
    assert document["agent_error"] is None
    shown = await ask(guest, agent, "list")
    assert "  proof  " in shown.out
    assert shown.out.count("online") == 2


async def test_a_list_is_shown_even_if_the_agent_is_silent(guest: MicroGuest, agent: ScriptedAgent) -> None:
    await agent.turn(Mood.SILENT)
    ran = await ask(guest, agent, "list", "--reply-timeout", "1", "--json")
    assert (ran.code, ran.document["enabled"]) == (0, "0-1")
    assert ran.document["agent_error"]["kind"] == "AgentSilentError"
    assert "which vCPUs the guest uses is not known: guest agent on" in ran.err


async def test_the_environment_names_the_agent_of_commands_that_ask_one(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    env = environment(QMPVCPU_QMP=str(guest.qmp), QMPVCPU_AGENT=agent.path)
    assert (await run("list", "--json", env=env)).document["vcpus"][0]["proof"] == "online"
    assert (await run("xml", env=env)).code == 0
    elsewhere = environment(QMPVCPU_QMP=str(guest.qmp), QMPVCPU_AGENT="/nonexistent")
    assert (await run("--agent", agent.path, "list", "--json", env=elsewhere)).document["agent_error"] is None


async def test_an_agent_that_is_no_address_is_bad_usage(guest: MicroGuest) -> None:
    ran = await run("list", "--qmp", guest.qmp, "--agent", "tcp:nowhere")
    assert ran.code == 2
    assert "--agent: " in ran.err


@pytest.mark.parametrize("line", ["set 0-1", "plug 2", "list"])
async def test_without_an_agent_nothing_of_it_is_loaded(line: str, guest: MicroGuest) -> None:
    refusing = "\n".join(f"sys.modules['qmpvcpu.agent.{name}'] = None" for name in ("client", "door", "numbering"))
    assert (await run(*line.split(), "--qmp", guest.qmp, code=refusing)).code == 0


async def test_the_guests_list_has_its_numbers_its_system_and_how_each_is_known(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    assert (await run("plug", "5", "--qmp", guest.qmp)).code == 0
    document = (await ask(guest, agent, "guest", "list", "--json")).document
    assert document["os"]["id"] == "debian"
    assert [(cpu["vcpu"], cpu["online"]) for cpu in document["cpus"]] == [(0, True), (1, True), (5, False)]
    assert {cpu["known_by"] for cpu in document["cpus"]} == {"firmware"}
    assert document["not_listed"] == ""
    shown = await ask(guest, agent, "guest", "list")
    assert "Debian GNU/Linux (kernel 6.12" in shown.out
    assert "offline" in shown.out


async def test_vcpus_go_online_and_offline_by_their_ids(guest: MicroGuest, agent: ScriptedAgent) -> None:
    assert (await run("plug", "4-5", "--qmp", guest.qmp)).code == 0
    ran = await ask(guest, agent, "guest", "online", "5", "0")
    assert "vCPU 5: online in the guest now" in ran.out
    assert "vCPU 0: online in the guest already" in ran.out
    assert agent.is_online(5)
    document = (await ask(guest, agent, "guest", "offline", "5", "--json")).document
    assert (document["changed"], agent.is_online(5)) == ("5", False)


async def test_each_way_an_agent_fails_has_its_code(guest: MicroGuest, agent: ScriptedAgent) -> None:
    offline = ("guest", "offline", "1", "--timeout", "1", "--json")
    await agent.turn(Mood.REFUSING)
    refused = await ask(guest, agent, *offline)
    assert (refused.code, refused.error["kind"], refused.error["errno"]) == (1, "GuestRefusedError", "EBUSY")
    await agent.turn(Mood.FORBIDDING)
    agent.forbidden = frozenset({"guest-get-vcpus"})
    forbidden = await ask(guest, agent, *offline)
    assert (forbidden.code, forbidden.error["command"]) == (1, "guest-get-vcpus")
    await agent.turn(Mood.NORMAL)
    unknown = await ask(guest, agent, "guest", "online", "7", "--json")
    assert (unknown.code, unknown.error["kind"], unknown.error["ids"]) == (2, "GuestNumberUnknownError", "7")
    await agent.turn(Mood.LYING)
    assert (await ask(guest, agent, *offline)).error["kind"] == "MalformedAnswerError"
    await agent.turn(Mood.SILENT)
    silent = await ask(guest, agent, *offline)
    assert (silent.code, silent.error["kind"]) == (3, "AgentSilentError")
    swapped = await run(*offline, "--qmp", guest.qmp, "--agent", guest.qmp)
    assert (swapped.code, swapped.error["kind"]) == (3, "AgentConnectError")


async def test_a_guest_command_without_an_agent_is_bad_usage(guest: MicroGuest) -> None:
    ran = await run("guest", "list", "--qmp", guest.qmp)
    assert ran.code == 2
    assert "which agent? Name its socket: --agent ADDRESS" in ran.err


async def test_watch_asks_the_guest_again_and_tells_what_its_list_proves(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    agent.cpus[1].online = False
    asked = asyncio.Event()

    def look() -> tuple[int, ...]:
        asked.set()
        return 0, 1

    agent.look = look
    words = ("watch", "--for", "7", "--json", "--qmp", guest.qmp, "--agent", agent.path)
    async with running(*words) as it:
        await asked.wait()
        await asyncio.sleep(0.5)  # until it has the first list
        agent.cpus[1].online = True
        ran = await it.end()
    events = [(each.get("event"), each.get("ids"), each.get("proof")) for each in ran.documents]
    assert ("VcpuProven", "1", "online") in events


async def test_watch_goes_on_without_an_agent_that_is_silent(guest: MicroGuest, agent: ScriptedAgent) -> None:
    await agent.turn(Mood.SILENT)
    ran = await ask(guest, agent, "watch", "--for", "0.2")
    assert ran.code == 0
    assert "which vCPUs the guest uses is not known yet" in ran.err


async def test_doctor_tells_what_the_agent_may_do_and_what_to_do_about_the_rest(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    async def findings(timeout: str = "5") -> list[tuple[str, str, str]]:
        ran = await ask(guest, agent, "doctor", "--reply-timeout", timeout, "--json")
        of_guest = [each for each in ran.document["findings"] if each["subject"] in ("agent", "guest's CPUs")]
        assert [each for each in of_guest if each["level"] != "ok" and not each["advice"]] == []
        return [(each["level"], each["found"], each["advice"]) for each in of_guest]

    agent.cpus[1].online = False
    told = await findings()
    assert told[0][1].startswith("it answers: Debian GNU/Linux (kernel 6.12")
    assert told[1][1] == "it carries out every command that is needed"
    assert told[2][1] == "which vCPU each is: 2 by the guest's files"
    assert told[3] == ("note", "vCPU 1: offline", "qmpvcpu guest online 1")
    await agent.turn(Mood.FORBIDDING)
    told = await findings()
    assert told[1][0] == "warning"
    assert "does not carry out guest-file-close, guest-file-open, guest-file-read: " in told[1][1]
    await agent.turn(Mood.SILENT)
    ((level, found, advice),) = await findings("1")
    assert (level, "no answer within 1 s" in found) == ("fault", True)
    assert "install qemu-guest-agent and start it" in advice


async def test_doctor_says_that_an_agent_without_a_vm_was_not_asked(agent: ScriptedAgent) -> None:
    document = (await run("doctor", "--agent", agent.path, "--json")).document
    assert "it was not asked: the VM it belongs to is not named" in [each["found"] for each in document["findings"]]


async def test_a_fleet_finds_each_vms_agent_by_a_pattern(guest: MicroGuest, agent: ScriptedAgent) -> None:
    agent_pattern = f"{Path(agent.path).parent}/{{stem}}"
    Path(agent.path).with_name(guest.qmp.stem).symlink_to(agent.path)
    words = ("--qmp", guest.qmp, "--agent", agent_pattern)
    ran = await run("fleet", "set", "0-1,4", "--proof", "online", *words, "--json")
    assert ran.document["vms"][0]["steps"][0]["proofs"]["online"] > 0
    listed = await run("fleet", "list", *words)
    assert (listed.code, listed.err) == (0, "")
    assert "0-1,4  0-1,4 " in listed.out
    document = (await run("fleet", "list", *words, "--json")).document
    assert document["vms"][0]["agent_error"] is None
    assert document["vms"][0]["vcpus"][4]["proof"] == "online"
    await agent.turn(Mood.SILENT)
    silent = await run("fleet", "list", *words, "--reply-timeout", "1", "--json")
    assert (silent.code, silent.document["vms"][0]["agent_error"]["kind"]) == (0, "AgentSilentError")


async def test_a_fleet_takes_no_agent_for_more_than_one_vm(guest: MicroGuest, agent: ScriptedAgent) -> None:
    both = ("fleet", "list", "--qmp", guest.qmp, "--qmp", "/nonexistent")
    ran = await run(*both, "--agent", agent.path)
    assert ran.code == 2
    assert "all VMs would have one agent; a pattern is such as {dir}/{stem}.agent" in ran.err
    for_one = environment(QMPVCPU_QMP=str(guest.qmp), QMPVCPU_AGENT=agent.path)
    assert "agent_error" in (await run("fleet", "list", "--json", env=for_one)).document["vms"][0]
    assert "agent_error" not in (await run(*both, "--json", env=for_one)).document["vms"][0]


async def test_doctor_knows_that_windows_gives_no_vcpu_up(guest: MicroGuest, agent: ScriptedAgent) -> None:
    agent.answers["guest-get-osinfo"] = {"id": "mswindows", "pretty-name": "Windows Server 2022 Standard"}
    document = (await ask(guest, agent, "doctor", "--json")).document
    (found,) = [each for each in document["findings"] if each["subject"] == "unplug"]
    assert (found["level"], found["advice"]) == ("warning", "only plugs are possible in it")
    assert "Windows, which releases no vCPU" in found["found"]


async def test_a_fleet_denies_what_the_system_in_a_guest_cannot_do(guest: MicroGuest, agent: ScriptedAgent) -> None:
    agent.answers["guest-get-osinfo"] = {"id": "mswindows", "name": "Microsoft Windows"}
    words = ("--qmp", guest.qmp, "--agent", f"{Path(agent.path).parent}/{{stem}}")
    Path(agent.path).with_name(guest.qmp.stem).symlink_to(agent.path)
    ran = await run("fleet", "set", "0", *words, "--json")
    assert (ran.code, ran.document["vms"][0]["error"]["reason"]) == (2, "guest_cannot_unplug")


@pytest.mark.parametrize(
    "words",
    [
        ("guest", "list", "--reply-timeout", "0.5"),
        ("guest", "--reply-timeout", "0.5", "list"),
        ("guest", "online", "1", "--reply-timeout", "0.5"),
    ],
)
async def test_the_reply_timeout_is_the_agents_too(
    guest: MicroGuest, agent: ScriptedAgent, words: tuple[str, ...]
) -> None:
    await agent.turn(Mood.SILENT)
    ran = await ask(guest, agent, *words)
    assert ran.code == 3
    assert "no answer within 0.5 s" in ran.err


async def test_what_an_unplug_asks_the_guest_first_is_shown_and_not_what_its_list_proves(
    guest: MicroGuest, agent: ScriptedAgent
) -> None:
    words = ("unplug", "1", "--offline-first", "--timeout", "1.5")
    await agent.turn(Mood.SILENT)
    silent = await ask(guest, agent, *words)
    assert "vCPU 1: the guest's agent is asked to take it offline" in silent.err
    await agent.turn(Mood.NORMAL)
    await guest.set_behaviour(Behaviour.hanging())
    ran = await ask(guest, agent, *words)
    assert "vCPU 1: the guest works on it" in ran.err
    assert "online" not in ran.err.replace("offline", "")


async def test_a_map_shows_that_the_agent_is_asked(guest: MicroGuest, agent: ScriptedAgent) -> None:
    await agent.turn(Mood.SILENT)
    ran = await ask(guest, agent, "set", "0", "--offline-first", "--timeout", "1.5", "--reply-timeout", "1.5")
    assert "0 of 1: asking the guest's agent, then QEMU" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plug", "3", "--no-online"), "--no-online goes with --proof online"),
        (("set", "0", "--no-online", "--proof", "started"), "--no-online goes with --proof online"),
        (("fleet", "set", "0", "--no-online"), "--no-online goes with --proof online"),
        (("plug", "3", "--proof", "online", "--affect", "config"), "--proof is about the running VM"),
        (
            ("set", "0", "--proof", "online", "--offline-first", "--affect", "config"),
            "--proof and --offline-first are about the running VM",
        ),
        (("unplug", "1", "--offline-first", "--affect", "config"), "--offline-first is about the running VM"),
        (("plan", "0", "--offline-first", "--affect", "config"), "--offline-first is about the running VM"),
    ],
)
async def test_an_option_about_the_guest_that_has_no_effect_is_bad_usage(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    ran = await run(*words, "--record", tmp_path / "vm.xml", "--qmp", "/nonexistent")
    assert ran.code == 2
    assert said in " ".join(ran.err.split())


async def test_recover_without_an_agent_names_what_may_be_offline_and_the_option(
    guest: MicroGuest, agent: ScriptedAgent, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    await guest.set_behaviour(Behaviour.hanging())
    words = ("set", "0", "--offline-first", "--record", record, "--qmp", guest.qmp, "--agent", agent.path)
    async with running(*words) as it:
        await it.wait_said("vCPU 1: the guest works on it")
        it.process.send_signal(signal.SIGKILL)
        await it.process.wait()
    vm = ("--record", record, "--qmp", guest.qmp)
    advice = "vCPU 1 may be offline in the guest, which only its agent can change: name it with --agent ADDRESS"
    assert advice in " ".join((await run("recover", *vm)).err.split())
    assert advice not in " ".join((await run("recover", *vm, "--agent", agent.path)).err.split())
    await guest.set_behaviour(Behaviour.refusing(0x82))
    left = await run("recover", "--revert", *vm, "--timeout", "2")
    assert advice in " ".join(left.err.split())
    assert "agent=" not in left.out + left.err
    back = await run("recover", "--revert", *vm, "--agent", agent.path)
    assert (back.code, agent.is_online(1)) == (0, True)
