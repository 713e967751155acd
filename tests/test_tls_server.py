"""TLS toward clients: certificates by SNI, reload, client validation that nothing leads around."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import textwrap

import pytest
import trustme
from loops import on_both_loops
from rekeyer import Rekeyer
from tls_peers import (
    AUTHORITY,
    OTHER_AUTHORITY,
    Seen,
    certificate,
    client_context,
    handshake,
    open_descriptors,
    port_section,
    refused,
    serving,
)

from certs.selfsigned import Authority
from l7proxy.tls_server import ServerTLS, TLSRefused
from l7proxy.tls_stream import TLSStream
from mesh.model.nodeconfig import CertificateSection, ClientValidation, Listener

EXACT = certificate("www.example.com")
WILD = certificate("*.example.com")
OTHER = certificate("other.test")
CERTIFICATES = {"certificate/n/exact": EXACT, "certificate/n/wild": WILD, "certificate/n/o": OTHER}
LISTENERS = (
    Listener("exact", "www.example.com", ("certificate/n/exact",)),
    Listener("wild", "*.example.com", ("certificate/n/wild",)),
)
CATCH_ALL = Listener("all", None, ("certificate/n/o",))
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize(
    ("sni", "names"),
    [
        ("www.example.com", ("www.example.com",)),
        ("WWW.Example.com", ("www.example.com",)),
        ("api.example.com", ("*.example.com",)),
        ("a.b.example.com", ("*.example.com",)),
        ("example.com", ("other.test",)),
        ("elsewhere.test", ("other.test",)),
        (None, ("other.test",)),
    ],
)
@on_both_loops
async def test_the_most_specific_listener_serves_its_certificate(sni, names):
    tls = ServerTLS(port_section(*LISTENERS, CATCH_ALL), CERTIFICATES)
    async with serving(tls.context) as port:
        seen = await handshake(port, sni)
    assert seen.names == names
    assert seen.greeting == f"{sni.lower() if sni else None} None"


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("sni", ["example.com", "elsewhere.test", None])
@on_both_loops
async def test_no_listener_no_handshake(sni, version):
    tls = ServerTLS(port_section(*LISTENERS), CERTIFICATES)
    async with serving(tls.context) as port:
        await refused(port, sni, client_context(version=version))


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (("h2", "http/1.1"), "h2"),
        (("http/1.1",), "http/1.1"),
        (("http/1.1", "h2"), "h2"),
        ((), None),
    ],
)
@on_both_loops
async def test_alpn_prefers_http2(offered, chosen):
    tls = ServerTLS(port_section(*LISTENERS), CERTIFICATES)
    async with serving(tls.context) as port:
        seen = await handshake(port, "www.example.com", client_context(alpn=offered))
    assert seen.greeting == f"www.example.com {chosen}"


@on_both_loops
async def test_versions():
    tls = ServerTLS(port_section(*LISTENERS), CERTIFICATES)
    async with serving(tls.context) as port:
        for version, name in ((V12, "TLSv1.2"), (V13, "TLSv1.3")):
            seen = await handshake(port, "www.example.com", client_context(version=version))
            assert seen.version == name
        old = client_context()
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        await refused(port, "www.example.com", old)
        weak = client_context(version=V12)
        weak.set_ciphers("ECDHE-ECDSA-AES128-SHA256")
        await refused(port, "www.example.com", weak)


@on_both_loops
async def test_of_several_certificates_the_one_with_the_name_is_served():
    listener = Listener("all", None, tuple(CERTIFICATES))
    tls = ServerTLS(port_section(listener), CERTIFICATES)
    async with serving(tls.context) as port:
        for sni, names in (
            ("www.example.com", ("www.example.com",)),
            ("api.example.com", ("*.example.com",)),
            ("a.b.example.com", ("www.example.com",)),  # none has it: the first
            ("other.test", ("other.test",)),
            (None, ("www.example.com",)),
        ):
            assert (await handshake(port, sni)).names == names


def _rsa(name: str) -> tuple[CertificateSection, str]:
    ca = trustme.CA(key_type=trustme.KeyType.RSA)
    issued = ca.issue_cert(name, key_type=trustme.KeyType.RSA)
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    section = CertificateSection(chain.decode(), issued.private_key_pem.bytes().decode())
    return section, ca.cert_pem.bytes().decode()


@on_both_loops
async def test_rsa_and_ecdsa_serve_the_same_name_by_what_the_client_can_do():
    rsa, rsa_ca = _rsa("www.example.com")
    certificates = {"certificate/n/rsa": rsa, **CERTIFICATES}
    tls = ServerTLS(port_section(Listener("all", None, tuple(certificates))), certificates)
    async with serving(tls.context) as port:
        for ciphers in ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256"):
            context = client_context(version=V12, ca_pem=rsa_ca + AUTHORITY.certificate_pem)
            context.set_ciphers(ciphers)
            seen = await handshake(port, "www.example.com", context)
            assert (seen.cipher, seen.names) == (ciphers, ("www.example.com",))


@on_both_loops
async def test_new_certificates_serve_new_handshakes_and_old_connections_stay():
    section = port_section(LISTENERS[0])
    before = ServerTLS(section, CERTIFICATES)
    renewed = certificate("www.example.com")
    after = ServerTLS(section, {"certificate/n/exact": renewed})
    async with serving(before.context) as port, serving(after.context) as new_port:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_context(), server_hostname="www.example.com"
        )
        seen = [await handshake(each, "www.example.com") for each in (port, new_port)]
        writer.write(b"?")
        assert await reader.readline() == b"www.example.com None\n"
        writer.close()
        await writer.wait_closed()
    ders = [ssl.PEM_cert_to_DER_cert(one.chain_pem) for one in (EXACT, renewed)]
    assert [one.der for one in seen] == ders


@on_both_loops
async def test_a_listener_without_its_certificate_refuses_and_the_others_serve():
    tls = ServerTLS(port_section(*LISTENERS), {"certificate/n/wild": WILD})
    async with serving(tls.context) as port:
        await refused(port, "www.example.com")
        assert (await handshake(port, "api.example.com")).names == ("*.example.com",)


@on_both_loops
async def test_start_tls_knows_the_sni_too():
    loop = asyncio.get_running_loop()
    tls = ServerTLS(port_section(*LISTENERS), CERTIFICATES)
    seen = loop.create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.start_tls(tls.context)
        seen.set_result(ServerTLS.sni_of(writer.get_extra_info("ssl_object")))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await writer.start_tls(client_context(), server_hostname="api.example.com")
    assert await seen == "api.example.com"
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


# --- client validation ------------------------------------------------------------------------

VALID_ONLY = ClientValidation(AUTHORITY.certificate_pem)
GOOD_CLIENT = certificate("client", client=True)


def _bad_clients() -> dict[str, CertificateSection | None]:
    return {
        "none": None,
        "unknown authority": certificate("c", authority=OTHER_AUTHORITY, client=True),
        "expired": certificate("c", client=True, days=-1),
        "for servers only": certificate("c"),
    }


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("sni", ["www.example.com", "api.example.com", "x.test", None])
@on_both_loops
async def test_valid_only_lets_nobody_else_in_whatever_the_sni(sni, version):
    tls = ServerTLS(port_section(*LISTENERS, CATCH_ALL, validation=VALID_ONLY), CERTIFICATES)
    async with serving(tls.context) as port:
        good = client_context(own=GOOD_CLIENT, version=version)
        assert (await handshake(port, sni, good)).greeting == f"{sni} None"
        for own in _bad_clients().values():
            await refused(port, sni, client_context(own=own, version=version))


@on_both_loops
async def test_an_intermediate_as_anchor_is_enough_and_trust_ends_there():
    root = trustme.CA()
    listed, unlisted = root.create_child_ca(), root.create_child_ca()
    tls = ServerTLS(
        port_section(CATCH_ALL, validation=ClientValidation(listed.cert_pem.bytes().decode())),
        CERTIFICATES,
    )

    def client(ca: trustme.CA) -> ssl.SSLContext:
        context = client_context()
        ca.issue_cert("client@example.com").configure_cert(context)
        return context

    async with serving(tls.context) as port:
        assert (await handshake(port, None, client(listed))).greeting == "None None"
        await refused(port, None, client(unlisted))


@pytest.mark.parametrize("version", [V12, V13])
@on_both_loops
async def test_a_session_leads_around_nothing(version):
    """Not to a name without a listener, and not past a validation that came later. TLS 1.2 resumes
    the session's name, TLS 1.3 takes the new one."""
    open_port = ServerTLS(port_section(*LISTENERS), CERTIFICATES)
    validating = ServerTLS(port_section(*LISTENERS, validation=VALID_ONLY), CERTIFICATES)
    context = client_context(version=version)
    async with serving(open_port.context) as port, serving(validating.context) as strict_port:
        first = await handshake(port, "www.example.com", context)
        again = await handshake(port, "www.example.com", context, first.session)
        assert again.reused  # or the rest would show nothing
        assert again.greeting == "www.example.com None"
        for sni in ("www.example.com", "api.example.com"):
            await refused(strict_port, sni, context, first.session)
        across = await handshake(port, "api.example.com", context, first.session)
        if version is V12:
            assert across.greeting == "www.example.com None"
            away = await handshake(port, "x.test", context, first.session)
            assert away.greeting == "www.example.com None"
        else:
            assert across.greeting == "api.example.com None"
            await refused(port, "x.test", context, first.session)


@pytest.mark.parametrize("version", [V12, V13])
@on_both_loops
async def test_sessions_of_validated_clients_stay_with_their_validation(version):
    section = port_section(*LISTENERS, validation=VALID_ONLY)
    before, after = ServerTLS(section, CERTIFICATES), ServerTLS(section, CERTIFICATES)
    good = client_context(own=GOOD_CLIENT, version=version)
    async with serving(before.context) as port, serving(after.context) as new_port:
        first = await handshake(port, "www.example.com", good)
        if version is V13:
            again = await handshake(port, "www.example.com", good, first.session)
            assert not again.reused
        assert not (await handshake(new_port, "www.example.com", good, first.session)).reused


@pytest.mark.parametrize("version", [V12, V13])
@on_both_loops
async def test_refuse_all_refuses_all(version):
    validation = ClientValidation("", "RefuseAll")
    before = ServerTLS(port_section(CATCH_ALL), CERTIFICATES)
    tls = ServerTLS(port_section(CATCH_ALL, validation=validation), CERTIFICATES)
    context = client_context(own=GOOD_CLIENT, version=version)
    async with serving(before.context) as open_port, serving(tls.context) as port:
        session = (await handshake(open_port, None, context)).session
        for old in (None, session):
            await refused(port, None, context, old)


@on_both_loops
async def test_insecure_fallback_lets_all_in():
    validation = ClientValidation(AUTHORITY.certificate_pem, "AllowInsecureFallback")
    tls = ServerTLS(port_section(CATCH_ALL, validation=validation), CERTIFICATES)
    async with serving(tls.context) as port:
        for own in (GOOD_CLIENT, *_bad_clients().values()):
            seen: Seen = await handshake(port, "x.test", client_context(own=own))
            assert seen.greeting == "x.test None"


def test_a_broken_validation_is_refused():
    with pytest.raises(TLSRefused, match="client validation: CA bundle"):
        ServerTLS(port_section(validation=ClientValidation("garbage")), {})


# --- certificates that cannot be used -----------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        CertificateSection(EXACT.chain_pem, WILD.key_pem),
        CertificateSection(EXACT.chain_pem, ""),
        CertificateSection("", EXACT.key_pem),
        CertificateSection(EXACT.chain_pem, EXACT.key_pem[:120]),
    ],
)
def test_a_bad_certificate_is_refused_by_its_key_and_without_its_private_key(section):
    with pytest.raises(TLSRefused, match=r"^certificate/n/bad: ") as caught:
        ServerTLS.check_certificate("certificate/n/bad", section)
    assert section.key_pem[30:60] not in str(caught.value) or not section.key_pem
    assert caught.value.__cause__ is None


def test_loading_leaves_no_descriptor_behind():
    before = open_descriptors()
    ServerTLS.check_certificate("certificate/n/exact", EXACT)
    assert open_descriptors() == before


def test_certificates_load_after_root_is_given_up():
    authority = Authority.create("r")
    chain, key = authority.issue(dns=["a.test"])
    program = textwrap.dedent(
        """
        import ctypes, os, sys
        from l7proxy.tls_server import ServerTLS
        from mesh.model.nodeconfig import (CertificateSection)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0
        chain, key = sys.stdin.read().split("|")
        ServerTLS.check_certificate("certificate/n/a", CertificateSection(chain, key))
        print("loaded as", os.getuid())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=f"{chain}|{key}",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("loaded as 65534\n", "")


@on_both_loops
async def test_who_asks_for_new_keys_and_reads_no_answers_is_cut_off(tmp_path):
    context = client_context()
    context.keylog_filename = str(tmp_path / "keys")
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    tls = ServerTLS(port_section(*LISTENERS), CERTIFICATES)
    client = TLSStream(context, server_hostname="www.example.com")
    loop, lost = asyncio.get_running_loop(), asyncio.Event()

    class Served(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

    server = loop.connect_accepted_socket(Served, theirs, ssl=tls.context)
    await asyncio.gather(loop.create_connection(lambda: client, sock=ours), server)
    await client.handshake()
    client.pause_reading()
    rekeyer = Rekeyer(tmp_path / "keys")
    try:
        while not lost.is_set():
            client._lower.write(rekeyer.key_updates(1000))
            await asyncio.sleep(0)
    finally:
        client.abort()
        while not client.lost:
            await asyncio.sleep(0)
