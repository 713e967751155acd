"""TLS toward endpoints through whole clusters: names, authorities, client certificates, ALPN."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import pytest
from loops import on_both_loops
from tls_peers import AUTHORITY, OTHER_AUTHORITY, certificate
from upstream_backend import GET, Backend, backend, finish

from l7proxy import tls
from l7proxy.pool import ConnectFailed
from l7proxy.tls_client import ClientTLS, TLSRefused
from l7proxy.upstream import Cluster, Clusters
from mesh.model.nodeconfig import (
    CertificateSection,
    ClusterSection,
    Settings,
    SubjectAltName,
    UpstreamTLS,
)

CA = AUTHORITY.certificate_pem
POLICY = UpstreamTLS("backend.x.test", CA)
SPIFFE = "spiffe://example.com/ns/a/sa/b"


def host(name: str) -> SubjectAltName:
    return SubjectAltName("Hostname", name)


def uri(name: str) -> SubjectAltName:
    return SubjectAltName("URI", name)


@contextlib.asynccontextmanager
async def endpoint(
    own: CertificateSection,
    *,
    alpn: tuple[str, ...] = ("h2", "http/1.1"),
    clients: str | None = None,
    seen: list[str | None] | None = None,
):
    context = tls.new_context(ssl.PROTOCOL_TLS_SERVER)
    tls.load_certificate(context, own, "test")
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if clients is not None:
        tls.trust(context, clients, "test")
    if seen is not None:
        context.sni_callback = lambda _, name, __: seen.append(name)
    async with backend("tls", context) as made:
        yield made


@contextlib.asynccontextmanager
async def cluster(
    one: Backend,
    policy: UpstreamTLS = POLICY,
    *,
    connect_timeout_s: float = 3.0,
    **more: object,
):
    clusters = Clusters(Settings(connect_timeout_s=connect_timeout_s))
    clusters.put("cluster/x", ClusterSection((one.endpoint,), tls=policy, **more))  # type: ignore[arg-type]
    made = clusters.get("cluster/x")
    yield made
    clusters.close()
    while made.stats().connections:
        await asyncio.sleep(0)


async def fails(made: Cluster, **how: object) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as caught:
        await made.acquire(**how)
    assert made.stats().connections == 0
    return caught.value


@pytest.mark.parametrize(
    "names", [("backend.x.test",), ("*.x.test",), ("other.test", "backend.x.test")]
)
@on_both_loops
async def test_a_certificate_for_the_hostname(names):
    seen: list[str | None] = []
    async with endpoint(certificate(*names), seen=seen) as one, cluster(one) as made:
        for _ in range(2):
            assert await finish(await made.acquire()) == "tls"
        assert seen == ["backend.x.test"]
        assert one.connections == 1


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (certificate("other.test"), "Hostname mismatch"),
        (certificate("a.backend.x.test"), "Hostname mismatch"),
        (certificate(uris=["https://backend.x.test"]), "Hostname mismatch"),
        (certificate("backend.x.test", days=-1), "expired"),
        (certificate("backend.x.test", authority=OTHER_AUTHORITY), "unable to get local issuer"),
        (certificate("backend.x.test", client=True), "purpose"),
    ],
)
@on_both_loops
async def test_certificates_that_are_not_valid(own, words):
    async with endpoint(own) as one, cluster(one) as made:
        error = await fails(made)
        assert (error.reason, error.status) == ("tls_certificate", 502)
        assert words in str(error)
        assert one.requests == 0


@pytest.mark.parametrize(
    ("own", "sans"),
    [
        (certificate("san.test"), (host("san.test"),)),
        (certificate("SAN.test"), (host("san.TEST"),)),
        (certificate("a.test", "san.test"), (host("x.test"), host("san.test"))),
        (certificate("*.x.test"), (host("san.x.test"),)),
        (certificate("*.x.test"), (host("*.x.test"),)),
        (certificate("san.x.test"), (host("*.x.test"),)),
        (certificate(uris=[SPIFFE]), (uri(SPIFFE),)),
        (certificate("a.test", uris=[SPIFFE]), (host("x.test"), uri(SPIFFE))),
    ],
)
@on_both_loops
async def test_one_of_the_listed_names_is_enough_and_the_hostname_is_only_sni(own, sans):
    seen: list[str | None] = []
    policy = UpstreamTLS("sni.test", CA, sans)
    async with endpoint(own, seen=seen) as one, cluster(one, policy) as made:
        assert await finish(await made.acquire()) == "tls"
    assert seen == ["sni.test"]


@pytest.mark.parametrize(
    ("own", "sans"),
    [
        (certificate("sni.test"), (host("san.test"),)),
        (certificate("a.san.test"), (host("san.test"),)),
        (certificate("san.test"), (host("a.san.test"),)),
        (certificate("*.x.test"), (host("a.b.x.test"),)),
        (certificate("a.b.x.test"), (host("*.x.test"),)),
        (certificate("*.test"), (host("san.test"),)),
        (certificate("san.test"), (host("*.test"),)),
        (certificate("test"), (host("*"),)),
        (certificate(uris=[SPIFFE + "c"]), (uri(SPIFFE),)),
        (certificate(uris=[SPIFFE]), (uri(SPIFFE.upper()),)),
        (certificate("san.test"), (uri("san.test"),)),
        (certificate(uris=["san.test"]), (host("san.test"),)),
        (certificate(), (host("server"),)),  # its common name
    ],
)
@on_both_loops
async def test_none_of_the_listed_names(own, sans):
    async with endpoint(own) as one, cluster(one, UpstreamTLS("sni.test", CA, sans)) as made:
        error = await fails(made)
        assert error.reason == "tls_certificate"
        assert "none of the subjectAltNames" in str(error)
        assert one.requests == 0


@on_both_loops
async def test_listed_names_do_not_replace_the_authority():
    policy = UpstreamTLS("san.test", CA, (host("san.test"),))
    for own in (
        certificate("san.test", authority=OTHER_AUTHORITY),
        certificate("san.test", days=-1),
    ):
        async with endpoint(own) as one, cluster(one, policy) as made:
            assert (await fails(made)).reason == "tls_certificate"


@on_both_loops
async def test_plain_text_behind_the_port_is_a_handshake_failure():
    async with backend() as one, cluster(one) as made:
        talk = asyncio.ensure_future(made.acquire())
        await one.until(open=1)
        for writer in one.open:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(ConnectFailed) as caught:
            await talk
        assert caught.value.reason == "tls_handshake"


@on_both_loops
async def test_an_endpoint_that_hangs_up_in_the_handshake():
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    one = Backend("x")
    one.endpoint = type(one.endpoint)(*server.sockets[0].getsockname())
    async with cluster(one) as made:
        error = await fails(made)
        assert error.reason in ("connect_failed", "tls_handshake")
    server.close()
    await server.wait_closed()


@on_both_loops
async def test_a_handshake_that_hangs_is_cut_off_by_the_connect_timeout():
    async with backend() as one, cluster(one, connect_timeout_s=0.05) as made:
        assert (await fails(made)).reason == "connect_timeout"
        await one.until(connections=1, open=0)


@on_both_loops
async def test_client_certificates_do_not_mix():
    """Each identity has connections of its own, and no certificate none of theirs."""
    own = certificate("backend.x.test")
    ids = [(f"certificate/n/{name}", certificate(name, client=True)) for name in ("one", "two")]
    async with endpoint(own, clients=CA) as one, cluster(one) as made:
        for _ in range(2):
            for identity in ids:
                lease = await made.acquire(client_certificate=identity)
                assert await finish(lease) == "tls"
        assert one.connections == 2
        # TLS 1.3: the endpoint's refusal comes after the handshake.
        lease = await made.acquire()
        with pytest.raises(Exception, match=r"closed|gone"):
            await finish(lease)
        assert one.requests == 4


@on_both_loops
async def test_a_renewed_client_certificate_gets_new_connections():
    own = certificate("backend.x.test")
    async with endpoint(own, clients=CA) as one, cluster(one) as made:
        for count in (1, 2):
            renewed = certificate("me", client=True)
            await finish(await made.acquire(client_certificate=("certificate/n/me", renewed)))
            assert one.connections == count


@pytest.mark.parametrize(
    ("protocol", "alpn", "reason"),
    [
        ("http", ("h2", "http/1.1"), None),
        ("http", ("http/1.1",), None),
        ("http", (), None),
        ("wss", ("http/1.1",), None),
        ("h2c", ("h2",), None),
        ("h2c", ("http/1.1",), "tls_alpn"),
        ("h2c", (), "tls_alpn"),
    ],
)
@on_both_loops
async def test_alpn_is_the_clusters_protocol(protocol, alpn, reason):
    own = certificate("backend.x.test")
    async with endpoint(own, alpn=alpn) as one, cluster(one, protocol=protocol) as made:
        if reason is not None:
            assert (await fails(made)).reason == reason
            return
        lease = await made.acquire()
        lease.release()
        if protocol == "h2c":
            lease.stream.abort("seen enough")
        else:
            await lease.stream.request(GET)
            assert (await lease.stream.response()).status == 200
            lease.stream.abort("seen enough")


@on_both_loops
async def test_tls_that_changes_applies_to_new_connections():
    own = certificate("backend.x.test")
    async with endpoint(own) as one:
        clusters = Clusters(Settings())
        clusters.put("c", ClusterSection((one.endpoint,), tls=POLICY))
        made = clusters.get("c")
        busy = await made.acquire()
        await finish(await made.acquire())
        one.hold()
        finishing = asyncio.ensure_future(finish(busy))
        await one.until(requests=2)
        other = UpstreamTLS("backend.x.test", OTHER_AUTHORITY.certificate_pem)
        clusters.put("c", ClusterSection((one.endpoint,), tls=other))
        with pytest.raises(ConnectFailed):
            await made.acquire()
        one.go_on()
        assert await finishing == "tls"
        await one.until(open=0)
        clusters.close()


def test_contexts_are_shared_by_value():
    again = UpstreamTLS("other.test", CA)
    one, two = (ClientTLS(policy, None, http2=False) for policy in (POLICY, again))
    assert one.context is two.context
    own = certificate("me", client=True)
    different = [
        ClientTLS(POLICY, None, http2=True),
        ClientTLS(POLICY, own, http2=False),
        ClientTLS(UpstreamTLS("other.test", CA, (host("a.test"),)), None, http2=False),
        ClientTLS(UpstreamTLS("other.test", OTHER_AUTHORITY.certificate_pem), None, http2=False),
        ClientTLS(UpstreamTLS("other.test"), None, http2=False),
    ]
    assert len({one.context, *(each.context for each in different)}) == 6


def test_every_context_verifies():
    for policy in (POLICY, UpstreamTLS("a.test"), UpstreamTLS("a.test", CA, (host("a.test"),))):
        context = ClientTLS(policy, None, http2=False).context
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname is not bool(policy.sans)
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("name", ["a" * 64 + ".test", "", ".test", "a\0b.test"])
def test_a_hostname_that_no_server_can_have_is_refused(name):
    with pytest.raises(TLSRefused, match="cannot be a server's name"):
        ClientTLS(UpstreamTLS(name, CA), None, http2=False)
