"""Judging PEM, and the throw-away authority."""

from __future__ import annotations

import base64
import datetime
import shutil
import ssl
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from certs.keypair import BadCertificate, KeyPair, check_ca_bundle, check_keypair
from certs.selfsigned import Authority

AUTHORITY = Authority.create("test root")
CHAIN, KEY = AUTHORITY.issue(dns=["www.example.com"])


def _pem(key, password: bytes | None = None) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption(),
    ).decode()


SHA256 = hashes.SHA256()


def _self_signed(key, algorithm=SHA256) -> str:
    name = x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now)
    certificate = builder.sign(key, algorithm)
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def test_what_is_known_of_a_pair():
    chain, key = AUTHORITY.issue(
        dns=["WWW.Example.com", "*.example.com"],
        ips=["10.0.0.1", "::1"],
        uris=["spiffe://example.com/ns/a/sa/b"],
        days=30,
    )
    pair = check_keypair(chain.encode(), key.encode())
    now = datetime.datetime.now(datetime.UTC)
    assert pair.key_type == "EC"
    assert pair.dns == ("www.example.com", "*.example.com")
    assert pair.ips == ("10.0.0.1", "::1")
    assert pair.uris == ("spiffe://example.com/ns/a/sa/b",)
    assert pair.not_before < now < pair.not_after
    assert pair.not_after - now > datetime.timedelta(days=29)
    fingerprint = x509.load_pem_x509_certificate(chain.encode()).fingerprint(hashes.SHA256())
    assert pair.fingerprint == fingerprint.hex()


def test_an_expired_certificate_is_known_as_such():
    pair = check_keypair(*AUTHORITY.issue(dns=["a.test"], days=-2))
    assert pair.not_before < pair.not_after < datetime.datetime.now(datetime.UTC)


@pytest.mark.parametrize(
    ("key", "key_type"),
    [
        (rsa.generate_private_key(65537, 2048), "RSA"),
        (ec.generate_private_key(ec.SECP384R1()), "EC"),
    ],
)
def test_key_types(key, key_type):
    pair = check_keypair(_self_signed(key), _pem(key))
    assert isinstance(pair, KeyPair)
    assert pair.key_type == key_type


def test_ed25519():
    key = ed25519.Ed25519PrivateKey.generate()
    assert check_keypair(_self_signed(key, None), _pem(key)).key_type == "Ed25519"


def _all_bad_pairs():
    other_key = AUTHORITY.issue(dns=["other.test"])[1]
    small = rsa.generate_private_key(65537, 1024)
    good = rsa.generate_private_key(65537, 2048)
    numbers = good.private_numbers()
    wrong = rsa.RSAPrivateNumbers(
        **{name: getattr(numbers, name) for name in ("p", "q", "dmp1", "dmq1", "public_numbers")},
        d=numbers.d + 2,
        iqmp=numbers.iqmp + 2,
    ).private_key(unsafe_skip_rsa_key_validation=True)
    curve = ec.generate_private_key(ec.SECP256K1())
    exotic = ed448.Ed448PrivateKey.generate()
    return {
        "does not belong": (CHAIN, other_key),
        "certificate is empty": (" \n", KEY),
        "holds no PEM certificate": ("garbage", KEY),
        "certificate cannot be parsed": (CHAIN.replace(CHAIN[40:80], "A" * 40), KEY),
        "private key is empty": (CHAIN, ""),
        "not a PEM private key": (CHAIN, KEY[:150] + KEY[160:]),
        "is encrypted": (CHAIN, _pem(ec.generate_private_key(ec.SECP256R1()), b"secret")),
        "1024 bits": (_self_signed(small), _pem(small)),
        "inconsistent": (_self_signed(good), _pem(wrong)),
        "secp256k1": (_self_signed(curve), _pem(curve)),
        "neither RSA": (CHAIN, _pem(exotic)),
    }


BAD_PAIRS = _all_bad_pairs()


@pytest.mark.parametrize("words", BAD_PAIRS)
def test_bad_pairs_are_refused_without_quoting_the_key(words):
    chain, key = BAD_PAIRS[words]
    with pytest.raises(BadCertificate, match=words) as caught:
        check_keypair(chain, key)
    text = "".join(key.split("\n")[1:-2])
    assert not any(text[at : at + 12] in str(caught.value) for at in range(0, len(text) - 12, 4))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_certificate_of_no_version_that_there_is():
    """What `cryptography` says of it is no ValueError."""
    der = x509.load_pem_x509_certificate(CHAIN.encode()).public_bytes(serialization.Encoding.DER)
    fourth = base64.encodebytes(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x03", 1))
    chain = f"-----BEGIN CERTIFICATE-----\n{fourth.decode()}-----END CERTIFICATE-----\n"
    with pytest.raises(BadCertificate, match="the certificate cannot be parsed: 3 is not a valid"):
        check_keypair(chain, KEY)
    with pytest.raises(BadCertificate, match="the CA bundle cannot be parsed"):
        check_ca_bundle(chain)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_a_weak_signature_is_refused(tmp_path):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -sha1 -subj /CN=a -keyout key -out chain"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True, timeout=30)
    with pytest.raises(BadCertificate, match="signed with sha1; use SHA-256"):
        check_keypair(*((tmp_path / name).read_bytes() for name in ("chain", "key")))


def test_a_ca_bundle_is_normalised():
    other = Authority.create("other").certificate_pem
    mine = AUTHORITY.certificate_pem
    assert check_ca_bundle(f"# a comment\n{mine}\n\n{other}{mine}") == mine + other
    assert check_ca_bundle(mine.encode()) == mine


@pytest.mark.parametrize(
    "pem", ["", "garbage", KEY, AUTHORITY.certificate_pem[:200], "-----BEGIN CERTIFICATE-----\n"]
)
def test_bundles_without_certificates_are_refused(pem):
    with pytest.raises(BadCertificate, match="the CA bundle"):
        check_ca_bundle(pem)


@pytest.mark.parametrize("client", [False, True])
def test_issued_certificates_pass_openssls_strictest_verification(client, tmp_path):
    chain, key = AUTHORITY.issue(dns=["a.test"], client=client)
    (tmp_path / "pair").write_text(chain + key)
    sides = []
    for server_side in (True, False):
        protocol = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=AUTHORITY.certificate_pem)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED if server_side is client else ssl.CERT_NONE
        if server_side is not client:
            context.load_cert_chain(tmp_path / "pair")
        else:
            fallback = AUTHORITY.issue(dns=["b.test"])
            (tmp_path / "other").write_text("".join(fallback))
            if server_side:
                context.load_cert_chain(tmp_path / "other")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides.append((context.wrap_bio(incoming, outgoing, server_side), incoming, outgoing))
    (one, one_in, one_out), (two, two_in, two_out) = sides
    for _ in range(4):
        for side in (two, one):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            one_in.write(two_out.read())
            two_in.write(one_out.read())
    verifier = one if client else two
    assert ("DNS", "a.test") in verifier.getpeercert()["subjectAltName"]


def test_memory_that_is_kept_private():
    code = """
import ctypes, os, resource
from certs.secrecy import keep_memory_private
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
keep_memory_private()
core = resource.getrlimit(resource.RLIMIT_CORE)
print(ctypes.CDLL(None).prctl(3), *core, os.stat("/proc/self/mem").st_uid)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0 0 0 0\n", "")
