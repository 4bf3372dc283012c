"""A connection to real servers: why it cannot be opened, and how it comes back."""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.errors import ServerConnectError, ServerForbiddenError, ServerLostError, UnfitServerError
from qmpvcpu.model.hosts import STATES, WISHES
from qmpvcpu.testing.nats import NatsCluster, NatsServer, free_ports
from tests.bus import credentials
from tests.bus.conftest import Connect
from tests.bus.proxy import Proxy
from tests.waiting import until


async def refusal(address: ServerAddress) -> ServerConnectError:
    """Return why *address* cannot be connected to."""
    with pytest.raises(ServerConnectError) as refused:
        await Bus.connect(address, name="test")
    return refused.value


async def test_a_connection_says_what_it_is_connected_to(server: NatsServer, connect: Connect) -> None:
    bus = await connect(server.url)
    assert bus.server_name == "test"
    assert bus.server_version in ("2.9.10", "2.15.1")
    assert not bus.in_cluster
    assert 1_000_000 < bus.most_bytes < 1024 * 1024
    assert bus.is_connected


async def test_a_server_that_does_not_run_is_named_at_once() -> None:
    (port,) = free_ports(1)
    async with asyncio.timeout(4):
        refused = await refusal(ServerAddress(f"nats://127.0.0.1:{port}"))
    assert str(refused) == (
        f"no connection to nats://127.0.0.1:{port}: Connection refused; "
        "start the server (nats-server -js), or check the address"
    )


@pytest.mark.parametrize("host", ["no-such-host.invalid", "..", "a" * 64])
async def test_a_host_name_that_leads_nowhere_is_told_as_that(host: str) -> None:
    refused = await refusal(ServerAddress(f"nats://{host}"))
    assert str(refused) == (
        f"no connection to nats://{host}:4222: the host name cannot be resolved; "
        "start the server (nats-server -js), or check the address"
    )


async def test_each_server_is_tried_and_each_says_why_not(connect: Connect) -> None:
    ports = free_ports(2)
    text = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
    refused = await refusal(ServerAddress(text))
    assert all(f"nats://127.0.0.1:{port}: Connection refused" in refused.why for port in ports)
    async with NatsServer() as server:
        assert (await connect(f"{text},{server.url}")).is_connected


@contextlib.asynccontextmanager
async def answering(greeting: bytes, heard: bytearray) -> AsyncIterator[int]:
    """A server of something else, with what it says first; what it hears is added to *heard*. Yields its port."""
    ended = asyncio.Event()
    ended.set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.clear()
        with contextlib.suppress(OSError):
            writer.write(greeting)
            heard.extend(await reader.read())
        writer.close()
        ended.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await ended.wait()


async def test_a_server_that_says_nothing_is_given_up() -> None:
    async with answering(b"", bytearray()) as port:
        address = ServerAddress(f"127.0.0.1:{port}")
        assert "no answer in 3 s" in (await refusal(address)).why
        with pytest.raises(ServerConnectError, match=r"no answer in 0\.2 s"):
            await Bus.connect(address, name="test", timeout=0.2)


async def test_a_server_of_something_else_is_told_from_one_of_nats() -> None:
    async with answering(b"220 mail.example ESMTP\r\n", bytearray()) as port:
        refused = await refusal(ServerAddress(f"127.0.0.1:{port}"))
    assert "empty response from server when expecting INFO message" in refused.why


async def test_a_wrong_password_is_told_with_what_to_give(tmp_path: Path, binary: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    config = 'authorization { users: [ { user: "web1", password: "a:b" } ] }'
    async with NatsServer(binary=binary, config=config) as server:
        login.write_text("web1:wrong\n")
        refused = await refusal(ServerAddress(server.url, login=login))
        assert "authorization violation" in refused.why.lower()
        assert "creds, nkey or login" in str(refused)
        assert "wrong" not in str(refused)
        assert "authorization violation" in (await refusal(ServerAddress(server.url))).why.lower()
        login.write_text("web1:a:b\n# that is it\n")
        assert (await connect(server.url, login=login)).is_connected


async def test_a_token_is_a_login(tmp_path: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    login.write_text("s3cret\n")
    async with NatsServer(config='authorization { token: "s3cret" }') as server:
        assert (await connect(server.url, login=login)).is_connected


async def test_an_nkey_is_a_login(tmp_path: Path, connect: Connect) -> None:
    seed, file = credentials.seed(), tmp_path / "seed"
    file.write_bytes(seed + b"\n")
    async with NatsServer(config=f"authorization {{ users: [ {{ nkey: {credentials.public(seed)} }} ] }}") as server:
        assert (await connect(server.url, nkey=file)).is_connected
        file.write_bytes(credentials.seed())
        assert "authorization violation" in (await refusal(ServerAddress(server.url, nkey=file))).why.lower()
        file.write_text("nonsense")
        assert f"{file}: " in (await refusal(ServerAddress(server.url, nkey=file))).why


async def test_credentials_are_a_login(tmp_path: Path, binary: Path, connect: Connect) -> None:
    operator, file = credentials.Operator(), tmp_path / "web1.creds"
    file.write_text(operator.credentials())
    async with NatsServer(binary=binary, config=operator.config()) as server:
        bus = await connect(server.url, creds=file)
        await bus.prepare()
        file.write_text(credentials.Operator().credentials())
        assert "authorization violation" in (await refusal(ServerAddress(server.url, creds=file))).why.lower()
        file.write_text("nonsense")
        assert f"{file}: " in (await refusal(ServerAddress(server.url, creds=file))).why


@pytest.mark.parametrize("kind", ["creds", "nkey", "login", "tls_ca"])
async def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    missing = tmp_path / "missing"
    refused = await refusal(ServerAddress("127.0.0.1", **{kind: missing}))
    assert refused.why == f"{missing}: No such file or directory"
    (tmp_path / "empty").write_text("")
    refused = await refusal(ServerAddress("127.0.0.1", **{kind: tmp_path / "empty"}))
    assert str(tmp_path / "empty") in refused.why


class Certificates:
    """A CA, and what it signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        new = ("-newkey", "rsa:2048", "-nodes")
        self._run("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
        (folder / "ext").write_text("subjectAltName=IP:127.0.0.1")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext")
        for name in ("server", "client"):
            self._run("req", *new, "-keyout", f"{name}.key", "-out", "csr", "-subj", f"/CN={name}")
            self._run("x509", "-req", "-in", "csr", "-out", f"{name}.pem", *signed)

    def _run(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)

    def path(self, name: str) -> Path:
        return self.folder / name

    def config(self, more: str = "") -> str:
        files = f'cert_file: "{self.path("server.pem")}", key_file: "{self.path("server.key")}"'
        return f"tls {{ {files} {more} }}"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


async def test_a_certificate_of_an_unknown_ca_is_refused(certificates: Certificates, connect: Connect) -> None:
    async with NatsServer(config=certificates.config()) as server:
        for url in (server.url, server.url.replace("nats:", "tls:")):
            refused = await refusal(ServerAddress(url))
            assert "its certificate is not trusted: unable to get local issuer certificate" in refused.why
            assert "tls_ca" in str(refused)
            assert (await connect(url, tls_ca=certificates.path("ca.pem"))).is_connected


@pytest.mark.parametrize("end", ["client", "server"])
async def test_the_end_of_a_connection_with_tls_is_no_warning(
    certificates: Certificates, connect: Connect, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    async with NatsServer(config=certificates.config()) as server:
        bus = await connect(server.url, tls_ca=certificates.path("ca.pem"))
        if end == "client":
            await bus.close()
    if end == "server":
        await until(lambda: not bus.is_connected)
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_a_certificate_for_another_name_is_refused(certificates: Certificates) -> None:
    async with NatsServer(config=certificates.config()) as server:
        address = ServerAddress(f"tls://localhost:{server.port}", tls_ca=certificates.path("ca.pem"))
        assert "mismatch" in (await refusal(address)).why


async def test_a_server_may_want_the_clients_certificate(certificates: Certificates, connect: Connect) -> None:
    config = certificates.config(f', ca_file: "{certificates.path("ca.pem")}", verify: true')
    files = {"tls_ca": certificates.path("ca.pem")}
    async with NatsServer(config=config) as server:
        await refusal(ServerAddress(server.url, **files))
        mine = {"tls_cert": certificates.path("client.pem"), "tls_key": certificates.path("client.key")}
        assert (await connect(server.url, **files, **mine)).is_connected


async def test_tls_never_goes_on_in_the_clear(tmp_path: Path, certificates: Certificates) -> None:
    """Somebody in between could take the server's offer of TLS out."""
    login = tmp_path / "login"
    login.write_text("web1:geheim")
    heard = bytearray()
    info = b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"auth_required":true}\r\n'
    async with answering(info, heard) as port:
        for address in (
            ServerAddress(f"tls://127.0.0.1:{port}", login=login),
            ServerAddress(f"nats://127.0.0.1:{port}", login=login, tls_ca=certificates.path("ca.pem")),
        ):
            refused = await refusal(address)
            assert refused.why == "the server does not encrypt"
    assert heard == b""


async def test_a_server_without_jetstream_says_how_to_enable_it(binary: Path, connect: Connect) -> None:
    async with NatsServer(binary=binary, jetstream=False) as server:
        bus = await connect(server.url)
        with pytest.raises(UnfitServerError, match="nats-server -js"):
            await bus.prepare()
        with pytest.raises(UnfitServerError, match="nats-server -js"):
            await bus.bucket(WISHES)


async def test_an_account_without_jetstream_says_how_to_enable_it(
    tmp_path: Path, binary: Path, connect: Connect
) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    config = 'accounts { A: { users: [ { user: "web1", password: "x" } ] } }'
    async with NatsServer(binary=binary, config=config) as server:
        bus = await connect(server.url, login=login)
        with pytest.raises(UnfitServerError, match="not for this account; enable it"):
            await bus.prepare()


async def test_a_connection_comes_back_and_says_so(server: NatsServer, connect: Connect) -> None:
    told: list[str] = []
    bus = await connect(server.url, on_lost=lambda: told.append("lost"), on_back=lambda: told.append("back"))
    await bus.prepare()
    bucket = await bus.bucket(WISHES)
    await server.kill()
    await until(lambda: told == ["lost"], within=20)
    assert not bus.is_connected
    write = asyncio.create_task(bucket.put("web1.a", b"1"))
    await server.start()
    await write
    await bus.wait_connected()
    assert told == ["lost", "back"]


async def test_a_connection_comes_back_even_after_a_fault_that_nobody_thought_of(
    server: NatsServer, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await connect(server.url)
    with monkeypatch.context() as patch:
        patch.setattr(bus._link, "_dial_any", AsyncMock(side_effect=RuntimeError("of no kind that we know")))
        await server.kill()
        await server.start()
        await until(lambda: "of no kind that we know" in caplog.text)
    async with asyncio.timeout(60):
        await bus.wait_connected()


async def test_a_server_that_no_longer_answers_is_noticed_though_its_connection_stays(
    server: NatsServer, connect: Connect
) -> None:
    bus = await connect(server.url)
    server.freeze()
    await until(lambda: not bus.is_connected, within=20)
    server.thaw()
    async with asyncio.timeout(20):
        await bus.wait_connected()


async def test_a_peer_that_takes_no_more_bytes_does_not_hold_up_the_next_connection(connect: Connect) -> None:
    async with NatsServer() as server, Proxy(server.host, server.port) as proxy:
        bus = await connect(proxy.url)
        await bus.prepare()
        bucket = await bus.bucket(STATES)
        proxy.stop()
        writes = [asyncio.create_task(bucket.put(f"web1.{number}", bytes(900_000))) for number in range(20)]
        await until(lambda: not bus.is_connected, within=20)
        proxy.go_on()
        await asyncio.gather(*writes)
        assert len(await bucket.keys()) == 20


async def test_a_user_that_is_taken_away_and_given_back_is_let_in_again(
    tmp_path: Path, binary: Path, connect: Connect
) -> None:
    """NATS closes such a connection with an error, at which clients usually give up."""
    login = tmp_path / "login"
    login.write_text("web1:x")
    config = 'authorization { users: [ { user: "%s", password: "%s" } ] }'
    async with NatsServer(binary=binary, config=config % ("web1", "x")) as server:
        bus = await connect(server.url, login=login)
        await server.reload(config % ("other", "x"))
        await until(lambda: not bus.is_connected, within=20)
        login.write_text("web1:new")
        await server.reload(config % ("web1", "new"))
        async with asyncio.timeout(20):
            await bus.wait_connected()
        await bus.prepare()


async def test_a_clusters_servers_that_nobody_named_are_used_too(cluster: NatsCluster, connect: Connect) -> None:
    bus = await connect(cluster.servers[0].url)
    assert bus.in_cluster
    client = bus._link.client
    await until(lambda: len(client.discovered_servers) > 1, within=20)  # it tells of them once they have met
    await cluster.servers[0].kill()
    await until(lambda: not bus.is_connected, within=20)
    async with asyncio.timeout(20):
        await bus.wait_connected()
    assert bus.server_name != cluster.servers[0].name


async def test_a_forbidden_write_is_an_error_and_no_silence(tmp_path: Path, binary: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    async with NatsServer(binary=binary, config=users(publish='deny: "$KV.qmpvcpu_wishes.Web2.>"')) as server:
        bus = await connect(server.url, login=login)
        await bus.prepare()
        bucket = await bus.bucket(WISHES)
        await bucket.put("web1.a", b"1")
        async with asyncio.timeout(3):  # less than a question is given
            with pytest.raises(ServerForbiddenError) as refused:
                await bucket.put("Web2.a", b"1")
        assert refused.value.subject == "$KV.qmpvcpu_wishes.Web2.a"
        assert str(refused.value) == (
            "qmpvcpu_wishes: write Web2.a: the server does not let this user publish to "
            "$KV.qmpvcpu_wishes.Web2.a; allow it in the user's permissions"
        )
        assert await bucket.keys() == ["web1.a"]


def users(*, publish: str = 'allow: ">"', subscribe: str = 'allow: ">"') -> str:
    """Return the configuration of a user with permissions."""
    permissions = f"publish: {{ {publish} }}, subscribe: {{ {subscribe} }}"
    return f'authorization {{ users: [ {{ user: "web1", password: "x", permissions: {{ {permissions} }} }} ] }}'


async def test_a_forbidden_watch_is_an_error_and_no_silence(tmp_path: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    denied = "$JS.API.CONSUMER.CREATE.KV_qmpvcpu_wishes.*.$KV.qmpvcpu_wishes.web2.>"
    async with NatsServer(config=users(publish=f'deny: "{denied}"')) as server:
        bus = await connect(server.url, login=login)
        await bus.prepare()
        bucket = await bus.bucket(WISHES)
        async with bucket.watch("web1.>") as feed:
            assert await anext(feed) is None
        with pytest.raises(ServerForbiddenError, match=r"watch \$KV\.qmpvcpu_wishes\.web2\.>"):
            async with bucket.watch("web2.>"):
                pass
        with pytest.raises(ServerForbiddenError):
            await bucket.all("web2.>")


async def test_who_may_not_subscribe_to_its_inbox_is_told(tmp_path: Path, binary: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    async with NatsServer(binary=binary, config=users(subscribe='deny: "_INBOX.>"')) as server:
        bus = await connect(server.url, login=login)
        for _ in range(2):
            with pytest.raises(ServerForbiddenError, match=r"subscribe to _INBOX\.>;"):
                await bus.prepare()


@pytest.mark.parametrize(
    ("inbox", "advice"),
    [
        (
            "_INBOX.who.root",
            "if the server knows it by another name than root, say which (QMPVCPU_WHO); else allow it",
        ),
        ("_INBOX.host.web1", "if the server knows it by another name than web1, say which (--host); else allow it"),
    ],
)
async def test_who_goes_by_another_name_than_the_servers_is_told_how_to_say_it(
    tmp_path: Path, inbox: str, advice: str
) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    async with NatsServer(config=users(subscribe='allow: "_INBOX.who.alice.>"')) as server:
        bus = await Bus.connect(ServerAddress(server.url, login=login), name="test", inbox=inbox)
        async with bus:
            with pytest.raises(ServerForbiddenError) as refused:
                await bus.prepare()
    assert advice in str(refused.value)


async def test_a_refusal_that_nobody_waits_for_is_logged(
    tmp_path: Path, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    async with NatsServer(config=users(publish='deny: "secret"')) as server:
        bus = await connect(server.url, login=login)
        with caplog.at_level(logging.WARNING, "qmpvcpu.bus"):
            await bus._link.client.publish("secret", b"")
            await until(lambda: "test may not publish to secret" in caplog.text)


async def test_a_closed_connection_asks_nothing_more(server: NatsServer, connect: Connect) -> None:
    bus = await connect(server.url)
    await bus.prepare()
    bucket = await bus.bucket(WISHES)
    server.freeze()
    waiting = asyncio.create_task(bucket.put("web1.a", b"1", timeout=1))
    await asyncio.sleep(0)
    await bus.close()
    server.thaw()
    with pytest.raises(ServerLostError):
        await waiting


def test_nothing_imports_nats_before_a_connection_is_opened() -> None:
    code = (
        "import sys, qmpvcpu, qmpvcpu.fleet, qmpvcpu.bus, qmpvcpu.testing.nats; "
        "from qmpvcpu.bus import Bus, Bucket, Endpoint, Lease, ServerAddress; "
        "print('nats' in sys.modules, 'nkeys' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"


async def test_without_nats_py_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "nats":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(UnfitServerError, match=r"pip install 'qmpvcpu\[hosts\]'"):
        await Bus.connect(ServerAddress("127.0.0.1"), name="test")
