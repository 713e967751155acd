"""What is tried against tunnels: who may not have one, at the end that is connected to and at the
end that connects. Nothing of it reaches a pod, and each has a reason that is counted."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from support.http1 import raw_backend
from support.mesh import CLIENT, ask, connected
from support.policy import http, rule
from support.proxy import backend, get, read_message
from support.two_nodes import (
    GATEWAY,
    WEB,
    Authority,
    TwoNodes,
    bare_svid,
    life,
    peer_context,
    spiffe,
    two_nodes,
)
from test_mesh_flows import agent_of
from test_mesh_relay import echo
from test_policy_tunnel import ME, identify, ingress

from certs.spiffe import parse, to_sni
from l7proxy import metrics, tunnel_wire
from l7proxy.tunnel_wire import Kind, Preface
from mesh.model.nodeconfig import MESH_TUNNEL_PORT, Settings, SvidSection
from mesh.model.section import bundle_key, svid_key

CLIENT_ID, WEB_ID, OTHER_ID = spiffe("client"), spiffe("web"), spiffe("other")
ASKED = to_sni(parse(WEB_ID))
FAST = Settings(connect_timeout_s=0.4, head_timeout_s=2)
OTHERS = Authority("other.example")


def counted(reason: str) -> float:
    return float(metrics.TUNNEL_FAILURES.labels(reason)._value.get())


@contextlib.asynccontextmanager
async def dialled(
    nodes: TwoNodes,
    context: ssl.SSLContext | None,
    sni: str | None = ASKED,
    source: str | None = None,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """An attacker's connection to node b, from node a's address unless told otherwise."""
    reader, writer = await asyncio.open_connection(
        nodes.addresses["b"],
        MESH_TUNNEL_PORT,
        local_addr=(source or nodes.addresses["a"], 0),
        ssl=context,
        server_hostname=(sni or "") if context is not None else None,
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def words(reader: asyncio.StreamReader) -> tuple[str, str]:
    """The refusal that is told: reason and why; empty: none."""
    try:
        magic, version, size = struct.unpack(">4sBH", await reader.readexactly(7))
        answer = tunnel_wire.msgspec.msgpack.decode(await reader.readexactly(size))
    except (OSError, asyncio.IncompleteReadError):
        return "", ""
    assert (magic, version) == (b"WEFT", 1)
    return answer.get("reason", ""), answer.get("why", "")


def svid(authority: Authority, spiffe_id: str = CLIENT_ID, **rest: object) -> SvidSection:
    (section,) = authority.svid(spiffe_id, **rest).values()  # type: ignore[arg-type]
    assert isinstance(section, SvidSection)
    return section


# --- who connects ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda ours: svid(OTHERS, "spiffe://other.example/ns/shop/sa/client"), "unknown_issuer"),
        # Its roots are known here, but they do not vouch for identities of ours.
        (lambda ours: svid(OTHERS), "unknown_issuer"),
        (lambda ours: svid(ours, valid=life(-60)), "expired"),
        (lambda ours: svid(ours, valid=life(3600, 60)), "not_yet_valid"),
        (lambda ours: bare_svid(CLIENT_ID), "unknown_issuer"),
        (lambda ours: svid(ours, uris=(CLIENT_ID, OTHER_ID)), "not_an_svid"),
        (lambda ours: svid(ours, uris=("https://shop/client",)), "not_an_svid"),
        (lambda ours: None, "handshake"),
    ],
    ids=[
        "other-trust-domain", "id-of-another-domain", "expired", "not-yet-valid", "self-signed",
        "two-uris", "no-spiffe-id", "no-certificate",
    ],
)  # fmt: skip
async def test_certificates_that_are_no_identity_of_ours(
    make: Callable[[Authority], SvidSection | None], reason: str
):
    async with two_nodes(FAST) as nodes, backend() as web, agent_of(nodes.b) as agent:
        if make(nodes.authority) and make(nodes.authority).spiffe_id == CLIENT_ID:
            assert nodes.b.apply(OTHERS.bundle()) == {}
        context = peer_context(nodes.authority, make(nodes.authority))
        before = counted(reason)
        with pytest.raises(OSError):  # noqa: PT012  (in TLS 1.3 a client learns of it when it reads)
            async with dialled(nodes, context) as (reader, writer):
                writer.write(tunnel_wire.encode(Preface("shop/client", WEB, web.port)))
                writer.write(get().encode())
                if not await reader.read(1):
                    raise ConnectionResetError
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.reason, web.connections) == ("DROPPED", reason, 0)
        assert counted(reason) == before + 1


@pytest.mark.parametrize(
    ("who", "preface", "reason", "told"),
    [
        (OTHER_ID, Preface("shop/client", WEB, 0), "pod_identity", "other cannot speak for shop/"),
        (CLIENT_ID, Preface("shop/other", WEB, 0), "pod_identity", "client cannot speak for shop/"),
        (CLIENT_ID, Preface("shop/far", WEB, 0), "pod_node", "shop/far runs on c, not on a"),
        (CLIENT_ID, Preface("shop/web", WEB, 0), "pod_node", "shop/web runs on b, not on a"),
        (CLIENT_ID, Preface("shop/nobody", WEB, 0), "pod_unknown", "there is no pod shop/nobody"),
        (CLIENT_ID, Preface("", WEB, 0), "pod_unknown", "there is no pod "),
        (CLIENT_ID, Preface("web/gw", WEB, 0, gateway=True), "pod_identity", "speak for web/gw"),
        (GATEWAY, Preface("shop/client", WEB, 0), "pod_identity", "gateway cannot speak for shop"),
        (
            CLIENT_ID,
            Preface("shop/client", "127.0.1.1", 0),
            "target_unknown",
            "is no pod's of this",
        ),
        (
            CLIENT_ID,
            Preface("shop/client", "10.0.0.99", 0),
            "target_unknown",
            "is no pod's of this",
        ),
        (CLIENT_ID, Preface("shop/client", "::ffff:x", 0), "target_unknown", "is no pod's of this"),
        (CLIENT_ID, Preface("shop/client", "127.0.1.9", 0), "target_identity", "not spiffe://clus"),
    ],
)
async def test_prefaces_that_the_peer_has_no_right_to(who, preface, reason, told):
    async with two_nodes(FAST) as nodes, backend() as web, agent_of(nodes.b) as agent:
        nodes.pod("other", "127.0.1.2", "a")
        nodes.pod("far", "127.0.1.3", "c", spiffe_id=CLIENT_ID)
        nodes.pod("db", "127.0.1.9", "b")
        context = peer_context(nodes.authority, svid(nodes.authority, who))
        preface = Preface(preface.source, preface.address, web.port, gateway=preface.gateway)
        before = counted(reason)
        async with dialled(nodes, context) as (reader, writer):
            writer.write(tunnel_wire.encode(preface) + get().encode())
            said, why = await words(reader)
        assert said == reason
        assert told in why
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.reason, web.connections) == ("DROPPED", reason, 0)
        assert counted(reason) == before + 1


@pytest.mark.parametrize("kind", ["http", "tcp"])
async def test_a_node_tells_no_other_identity_than_the_one_it_has_proved(kind: Kind):
    """Whatever it says that it has read; at a pod that asks for its clients' identities, and at one
    whose requests are judged there."""
    forged = ("X-Forwarded-Client-Cert: URI=forged", "X-Forwarded-For: 6.6.6.6")
    told = [("x-forwarded-for", CLIENT), ("x-forwarded-client-cert", f"URI={CLIENT_ID}")]
    async with two_nodes(FAST) as nodes, backend() as web:
        context = peer_context(nodes.authority, svid(nodes.authority))

        async def seen() -> list[tuple[str, str]]:
            async with dialled(nodes, context) as (reader, writer):
                preface = Preface("shop/client", WEB, web.port, kind)
                writer.write(tunnel_wire.encode(preface))
                assert await words(reader) == ("", "")
                writer.write(get("/public", "web", *forged).encode())
                assert (await read_message(reader)).status == 200
            (request,) = web.requests
            web.requests.clear()
            return [one for one in request.headers if one[0].startswith("x-forwarded-")]

        nodes.pod("web", WEB, "b", client_headers=True, http_ports=(web.port,))
        assert await seen() == told
        nodes.pod("web", WEB, "b")
        identify(nodes)
        ingress(nodes, rule("P", ME, http=http(path="/public")))
        # A route of the client's node may have asked for it.
        assert await seen() == (told if kind == "http" else [("x-forwarded-for", "6.6.6.6")])


async def test_a_stolen_svid_is_of_no_use_where_its_node_is_not():
    async with two_nodes(FAST) as nodes, backend() as web, agent_of(nodes.b) as agent:
        context = peer_context(nodes.authority, svid(nodes.authority))
        stranger = nodes.addresses["a"].removesuffix("2") + "9"
        for source, reason in ((nodes.addresses["c"], "pod_node"), (stranger, "node_unknown")):
            async with dialled(nodes, context, source=source) as (reader, writer):
                writer.write(tunnel_wire.encode(Preface("shop/client", WEB, web.port)))
                assert (await words(reader))[0] == reason
        with pytest.raises(OSError):
            async with dialled(nodes, context, source=CLIENT):
                pass
        assert [flow.reason for flow in await agent.records(3)] == [
            "pod_node", "node_unknown", "pod_address"
        ]  # fmt: skip
        assert web.connections == 0


@pytest.mark.parametrize("sni", [None, "other.example", to_sni(parse(OTHER_ID)), "sa.web"])
async def test_only_identities_of_this_node_can_be_asked_for(sni):
    async with two_nodes(FAST) as nodes, agent_of(nodes.b) as agent:
        context = peer_context(nodes.authority, svid(nodes.authority))
        with pytest.raises(OSError):
            async with dialled(nodes, context, sni):
                pass
        assert (await agent.records(1))[0].reason == "handshake"


async def test_an_svid_of_ours_that_has_expired_is_not_shown():
    async with two_nodes(FAST) as nodes, agent_of(nodes.b) as agent:
        nodes.hold("b", "web", life(-1))
        with pytest.raises(OSError):
            async with dialled(nodes, peer_context(nodes.authority, svid(nodes.authority))):
                pass
        assert (await agent.records(1))[0].reason == "handshake"


# --- how they speak -------------------------------------------------------------------------------


async def test_tls_1_2_is_refused():
    async with two_nodes(FAST) as nodes, agent_of(nodes.b) as agent:
        context = peer_context(nodes.authority, svid(nodes.authority))
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError):
            async with dialled(nodes, context):
                pass
        assert (await agent.records(1))[0].reason == "handshake"


@pytest.mark.parametrize("alpn", [None, "h2", "weft/2"])
async def test_peers_of_another_version_are_refused_by_alpn(alpn):
    async with two_nodes(FAST) as nodes, agent_of(nodes.b) as agent:
        context = peer_context(nodes.authority, svid(nodes.authority), alpn)
        async with dialled(nodes, context) as (reader, writer):
            writer.write(tunnel_wire.encode(Preface("shop/client", WEB, 1)))
            assert await words(reader) == ("", "")
        assert (await agent.records(1))[0].reason == "version"


@pytest.mark.parametrize(
    ("frame", "reason", "told"),
    [
        (b"WEFT\x02\x00\x01\xc0", "version", "tunnel version 2 is not spoken here, but 1"),
        (b"GET / HTTP/1.1\r\n\r\n", "preface", "does not speak Weft's tunnel protocol"),
        (b"WEFT\x01\xff\xff", "preface", "65535 bytes before the first are more than"),
        (b"WEFT\x01\x00\x01\xc1", "preface", "have no sense"),
        (b"WEFT\x01\x00\x00", "preface", "have no sense"),
        (b"WEFT\x01\x00\x09\x81\xa6source\x01", "preface", "have no sense"),
    ],
)
async def test_prefaces_that_are_none(frame, reason, told):
    async with two_nodes(FAST) as nodes, agent_of(nodes.b) as agent:
        context = peer_context(nodes.authority, svid(nodes.authority))
        async with dialled(nodes, context) as (reader, writer):
            writer.write(frame)
            said, why = await words(reader)
        assert said == reason
        assert told in why
        assert (await agent.records(1))[0].reason == reason


@pytest.mark.parametrize(
    "garbage", [get().encode(), b"\x16\x03\x01\xff\xff" + bytes(99), b"\0" * 64]
)
async def test_garbage_instead_of_tls(garbage):
    async with two_nodes(Settings(head_timeout_s=0.2)) as nodes, agent_of(nodes.b) as agent:
        async with dialled(nodes, None) as (reader, writer):
            writer.write(garbage)
            while await reader.read(100):
                pass
        assert (await agent.records(1))[0].reason in ("handshake", "handshake_timeout")


async def test_who_says_nothing_is_not_waited_for():
    async with two_nodes(Settings(head_timeout_s=0.2)) as nodes, agent_of(nodes.b) as agent:
        async with dialled(nodes, None) as (reader, _):
            assert await reader.read(1) == b""
        context = peer_context(nodes.authority, svid(nodes.authority))
        async with dialled(nodes, context) as (reader, writer):
            writer.write(b"WEF")
            assert (await words(reader))[0] == "preface_timeout"
        reasons = [flow.reason for flow in await agent.records(2)]
        assert reasons == ["handshake_timeout", "preface_timeout"]
        assert nodes.b.proxy._admission.total == 0


async def test_no_data_comes_early(tmp_path):
    """OpenSSL's own client gets a ticket, which allows none."""
    async with two_nodes(FAST) as nodes:
        section = svid(nodes.authority)
        chain, session, early = (tmp_path / name for name in ("chain", "session", "early"))
        chain.write_text(section.key_pem + section.chain_pem)
        early.write_bytes(tunnel_wire.encode(Preface("shop/client", WEB, 1)))

        async def client(*more: str) -> bytes:
            process = await asyncio.create_subprocess_exec(
                "openssl", "s_client", "-connect", f"{nodes.addresses['b']}:{MESH_TUNNEL_PORT}",
                "-bind", f"{nodes.addresses['a']}:0", "-servername", ASKED, "-alpn", "weft/1",
                "-cert", str(chain), "-cert_chain", str(chain), *more,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            # An answer has come, and with it whatever else the server had to say.
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"WEFT\x02\x00\x01\xc0")
            output = await process.stdout.read()
            await process.wait()
            assert b"ALPN protocol: weft/1" in output
            assert b"tunnel version 2 is not spoken here" in output
            # It stands wherever in what the client says of itself.
            return re.sub(rb"WEFT.*?together", b"", output, flags=re.DOTALL)

        first = await client("-sess_out", str(session))
        assert b"Max Early Data: 0" in first
        again = await client("-sess_in", str(session), "-early_data", str(early))
        assert b"Reused, TLSv1.3" in again
        assert b"Early data was not sent" in again


class Resuming:
    """A peer that is not Weft and keeps its sessions."""

    def __init__(self, nodes: TwoNodes, section: SvidSection) -> None:
        self.nodes = nodes
        self.context = peer_context(nodes.authority, section)
        self.session: ssl.SSLSession | None = None

    def _ask(self, preface: Preface, sni: str) -> tuple[bool, str]:
        there = (self.nodes.addresses["b"], MESH_TUNNEL_PORT)
        plain = socket.create_connection(there, 5, (self.nodes.addresses["a"], 0))
        with self.context.wrap_socket(
            plain, server_hostname=sni, session=self.session
        ) as connection:
            connection.sendall(tunnel_wire.encode(preface))
            try:
                answer = connection.recv(1000)
            except OSError:
                answer = b""
            self.session = connection.session
            reused = bool(connection.session_reused)
            # OpenSSL forgets the session of a connection that is freed without close_notify.
            with contextlib.suppress(OSError):
                connection.unwrap()
            return reused, str(tunnel_wire.msgspec.msgpack.decode(answer[7:])) if answer else "cut"

    async def ask(self, preface: Preface, sni: str = ASKED) -> tuple[bool, str]:
        """Whether the session before was resumed, and what was answered; "cut": nothing."""
        return await asyncio.to_thread(self._ask, preface, sni)


async def test_sessions_are_resumed_between_the_same_two_only():
    async with two_nodes(FAST) as nodes, backend() as web, agent_of(nodes.b) as agent:
        nodes.pod("db", "127.0.1.9", "b")
        nodes.hold("b", "db")
        section = svid(nodes.authority)
        peer = Resuming(nodes, section)
        to_web = Preface("shop/client", WEB, web.port)
        assert await peer.ask(to_web) == (False, "{}")
        assert await peer.ask(to_web) == (True, "{}")
        # Who it is and where to is judged as ever.
        for preface, reason in (
            (Preface("shop/web", WEB, web.port), "pod_node"),
            (Preface("shop/client", "127.0.1.9", web.port), "target_identity"),
            (Preface("shop/client", WEB, web.port, "proof"), "session"),
        ):
            reused, answer = await peer.ask(preface)
            assert reused
            assert reason in answer
        # Another identity's session; then to one that this peer has shown itself to as well.
        to_db = Preface("shop/client", "127.0.1.9", web.port), to_sni(parse(spiffe("db")))
        kept = peer.session
        assert await peer.ask(*to_db) == (True, "cut")
        reused, answer = await Resuming(nodes, section).ask(*to_db)
        assert not reused
        assert "connect_refused" in answer
        peer.session = kept
        assert await peer.ask(*to_db) == (True, "cut")
        reasons = [flow.reason for flow in await agent.records(8)]
        assert reasons.count("wrong_identity") == 2


@pytest.mark.parametrize("change", ["roots", "svid", "expired"])
async def test_sessions_end_with_what_they_were_made_with(change):
    async with two_nodes(FAST) as nodes, backend() as web, agent_of(nodes.b) as agent:
        until = life(1.5 if change == "expired" else 3600)
        peer = Resuming(nodes, svid(nodes.authority, valid=until))
        preface = Preface("shop/client", WEB, web.port)
        assert await peer.ask(preface) == (False, "{}")
        if change == "roots":
            new = Authority()
            nodes.b.apply(nodes.authority.bundle(new))
            assert await peer.ask(preface) == (False, "{}")
            return
        if change == "svid":
            nodes.b.apply({}, (svid_key(WEB_ID),))
            with pytest.raises(ssl.SSLError):
                await peer.ask(preface)
            return
        while time.time() < until.not_after.timestamp():
            await asyncio.sleep(0.05)
        assert await peer.ask(preface) == (True, "cut")
        assert (await agent.records(2))[-1].reason == "expired"


# --- who is connected to --------------------------------------------------------------------------


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What an honest node says first."""
    await reader.readuntil(b"shop/client")
    writer.write(tunnel_wire.encode(tunnel_wire.Answer()))
    await reader.read()
    writer.close()


@contextlib.asynccontextmanager
async def impostor(
    nodes: TwoNodes, context: ssl.SSLContext | None, answer: Handler = accept
) -> AsyncIterator[None]:
    """Somebody else at node b's address and port."""
    nodes.b.proxy.unlisten((nodes.addresses["b"], MESH_TUNNEL_PORT))
    server = await asyncio.start_server(
        answer, nodes.addresses["b"], MESH_TUNNEL_PORT, ssl=context, backlog=10
    )
    try:
        yield
    finally:
        server.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda ours: svid(OTHERS, "spiffe://other.example/ns/shop/sa/web"), "unknown_issuer"),
        (lambda ours: svid(OTHERS, WEB_ID), "unknown_issuer"),
        (lambda ours: svid(ours, OTHER_ID), "wrong_identity"),
        (lambda ours: svid(ours, spiffe("web", "other")), "wrong_identity"),
        (lambda ours: svid(ours, WEB_ID, valid=life(-60)), "expired"),
        (lambda ours: svid(ours, WEB_ID, valid=life(3600, 60)), "not_yet_valid"),
        (lambda ours: bare_svid(WEB_ID), "unknown_issuer"),
        (lambda ours: svid(ours, WEB_ID, uris=(WEB_ID, OTHER_ID)), "not_an_svid"),
    ],
    ids=[
        "other-trust-domain", "id-of-another-domain", "wrong-service-account", "wrong-namespace",
        "expired", "not-yet-valid", "self-signed", "two-uris",
    ],
)  # fmt: skip
async def test_endpoints_that_are_not_who_they_should_be(make, reason):
    async with two_nodes(FAST) as nodes, backend() as web:
        assert nodes.a.apply(OTHERS.bundle()) == {}
        context = peer_context(nodes.authority, make(nodes.authority), server=True)
        heard: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(await reader.read(1))
            writer.close()

        before = counted(reason)
        async with impostor(nodes, context, answer):
            assert (await ask(nodes.http(web.port))).status == 503
            with pytest.raises(ConnectionResetError):
                async with connected(nodes.relay(web.port)) as (reader, _):
                    await reader.read(1)
        assert counted(reason) == before + 2
        assert not any(heard)  # not a byte, not even who asks for what
        assert web.connections == 0
        log = await nodes.a.close()
        assert [line["reason"] for line in log] == [f"tunnel_{reason}"]


async def test_endpoints_that_speak_something_else():
    async with two_nodes(FAST) as nodes, backend() as web:
        port = nodes.http(web.port)
        good = svid(nodes.authority, WEB_ID)

        async def other_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"WEFT\x02\x00\x01\xc0")
            await reader.read()
            writer.close()

        async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        old = peer_context(nodes.authority, good, server=True)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
        for context, answer, reason in (
            (old, accept, "broken_off"),
            (peer_context(nodes.authority, good, "h2", server=True), accept, "version"),
            (peer_context(nodes.authority, good, server=True), other_version, "version"),
            (peer_context(nodes.authority, good, server=True), nothing, "timeout"),
            (peer_context(nodes.authority, good, server=True), gone, "broken_off"),
            (None, gone, "broken_off"),
            (None, nothing, "timeout"),
        ):
            before = counted(reason)
            async with impostor(nodes, context, answer):
                message = await ask(port)
            assert (message.status, counted(reason)) == (503, before + 1), reason
        assert web.connections == 0


async def test_a_peer_that_breaks_off_is_asked_once_more():
    """As one does whose process is ended: another has taken over."""
    async with two_nodes(FAST) as nodes, backend() as web:
        context = peer_context(nodes.authority, svid(nodes.authority, WEB_ID), server=True)
        asked = 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            asked += 1
            if asked == 1:
                writer.transport.abort()
            else:
                await accept(reader, writer)

        async with (
            impostor(nodes, context, answer),
            connected(nodes.relay(web.port)) as (reader, writer),
        ):
            writer.write_eof()
            assert await reader.read() == b""
        assert asked == 2


@pytest.mark.parametrize(
    ("key", "reason"),
    [(svid_key(CLIENT_ID), "svid_missing"), (bundle_key("cluster.local"), "bundle_missing")],
)
async def test_what_goes_meanwhile_is_missing_when_a_peer_is_asked_once_more(key: str, reason: str):
    async with two_nodes(FAST) as nodes, backend() as web, agent_of(nodes.a) as agent:
        context = peer_context(nodes.authority, svid(nodes.authority, WEB_ID), server=True)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert nodes.a.apply({}, (key,)) == {}
            writer.transport.abort()

        port = nodes.http(web.port)
        async with impostor(nodes, context, answer):
            assert (await ask(port)).body.decode().strip() == f"tunnel_{reason}"
        (flow,) = await agent.records(1)
        assert flow.reason == f"tunnel_{reason}"


async def test_nothing_is_plain_because_something_is_missing():
    """Closed, whatever is not there: identity, roots, node, the other proxy."""
    async with two_nodes(FAST) as nodes, backend() as web, raw_backend(echo) as other:
        http, relay = nodes.http(web.port), nodes.relay(other)
        everything = dict(nodes.a.config.sections)

        async def refused(reason: str) -> None:
            before = counted(reason)
            nodes.a.origins.steer()
            assert (await ask(http)).status == 503
            nodes.steer_relay(other)
            async with connected(relay) as (reader, _):
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
            assert counted(reason) == before + 2, reason

        for missing, reason in (
            (f"svid/{CLIENT_ID}", "svid_missing"),
            ("bundle/cluster.local", "bundle_missing"),
            ("node/b", "node_unknown"),
            ("workload/shop/web", "workload_unknown"),
        ):
            nodes.a.apply({}, (missing,))
            await refused(reason)
            nodes.a.apply({missing: everything[missing]})
        nodes.hold("a", "client", life(-1))
        await refused("svid_expired")
        nodes.hold("a", "client")
        nodes.b.proxy.unlisten((nodes.addresses["b"], MESH_TUNNEL_PORT))
        await refused("connect_refused")
        assert web.connections == 0
        sock = socket.create_server((nodes.addresses["b"], MESH_TUNNEL_PORT))
        nodes.b.proxy.listen((nodes.addresses["b"], MESH_TUNNEL_PORT), sock)
        nodes.a.origins.steer()
        assert (await ask(http)).status == 200
