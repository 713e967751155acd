"""The authority: what it signs and what it refuses, its rotations in time, and its files."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from contextlib import closing

import pytest
from certs_world import CART, LONG, NOW, Domain, chain_der, leaf_of, request
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from certs.authority import MAX_REQUEST, SKEW_S, Authority, Lives
from certs.brought import from_directory, from_secret
from certs.bundle import Bundle
from certs.errors import AuthorityError, IssueRefused, NotTrusted
from certs.issue import Issuer, Life
from certs.spiffe import parse
from certs.svid import peer_identity
from mesh.authority.files import read_brought

DOMAIN = "cluster.local"
ALLOWED = frozenset((parse(CART),))
DAY = 86_400.0
_LIVES = Lives()


@pytest.fixture
def opened(tmp_path):
    """Opens authorities in a directory; what a test leaves open is closed."""
    found = []

    def make(directory="ca", now=NOW, lives=_LIVES, brought=None, trust_domain=DOMAIN):
        if found:
            found.pop().close()
        found.append(Authority(tmp_path / directory, trust_domain, lives, now, brought))
        return found[-1]

    yield make
    for one in found:
        one.close()


def signed(authority, now=NOW):
    return authority.sign(request(CART), ALLOWED, now)


def trusted(issued, *bundles, now=NOW):
    """Whether everybody with one of these bundles takes it."""
    for bundle in bundles:
        identity = peer_identity(chain_der(issued.chain_pem), {DOMAIN: bundle}, now)
        assert identity == parse(CART)


def test_what_is_signed(opened):
    authority = opened()
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority.sign(request(CART, key=key), ALLOWED, NOW)
    trusted(issued, authority.bundle())
    assert (issued.spiffe_id, issued.not_after) == (parse(CART), NOW + 3600)
    leaf = leaf_of(issued.chain_pem)
    assert leaf.public_key() == key.public_key()
    assert leaf.not_valid_before_utc.timestamp() == NOW - SKEW_S
    # Its root is for the others to have.
    roots = authority.bundle().roots
    assert not set(x509.load_pem_x509_certificates(issued.chain_pem.encode())) & set(roots)


def test_nothing_of_a_request_is_taken_over_but_its_key(opened):
    asked = request(CART, dns=["www.example.com"], subject="admin", ca=True)
    issued = opened().sign(asked, ALLOWED, NOW)
    leaf = leaf_of(issued.chain_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [CART]
    assert not list(leaf.subject)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def _rsa_request():
    key = rsa.generate_private_key(65537, 2048)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(CART)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    return csr.public_bytes(Encoding.PEM).decode()


def _signed_by_another():
    """The request of one key with the signature of another."""
    one, two = (
        x509.load_pem_x509_csr(request(CART).encode()).public_bytes(Encoding.DER) for _ in range(2)
    )
    # Both are of one length but for the signature, whose two numbers may have a leading zero.
    body = x509.load_der_x509_csr(one)
    at = one.index(body.signature)
    other = x509.load_der_x509_csr(two).signature
    if len(other) != len(body.signature):
        return _signed_by_another()
    forged = x509.load_der_x509_csr(one[:at] + other)
    return forged.public_bytes(Encoding.PEM).decode()


REQUESTS = {
    "two URIs": (lambda: request(CART, CART.replace("cart", "web")), "not_one_uri"),
    "no URI": (lambda: request(dns=["cart"]), "not_one_uri"),
    "no names": (lambda: request(), "not_one_uri"),
    "another trust domain": (
        lambda: request("spiffe://example.org/ns/shop/sa/cart"),
        "wrong_trust_domain",
    ),
    "somebody else's": (lambda: request(CART.replace("cart", "web")), "not_on_this_node"),
    "no SPIFFE ID": (lambda: request("https://cluster.local/x"), "bad_spiffe_id"),
    "a dot segment": (lambda: request("spiffe://cluster.local/ns/x/../shop"), "bad_spiffe_id"),
    "the trust domain": (lambda: request("spiffe://cluster.local"), "not_on_this_node"),
    "garbage": (lambda: "garbage", "malformed"),
    "nothing": (lambda: "", "malformed"),
    "a certificate": (lambda: Domain(DOMAIN).bundle.to_pem(), "malformed"),
    "a truncated one": (lambda: request(CART)[:200], "malformed"),
    "not ASCII": (lambda: "ä" * 100, "malformed"),
    "oversized": (lambda: request(*[CART] * 200), "too_large"),
    "another one's signature": (_signed_by_another, "malformed"),
    "an RSA key": (_rsa_request, "weak_key"),
    "a weak curve": (
        lambda: request(CART, key=ec.generate_private_key(ec.SECP224R1())),
        "weak_key",
    ),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_what_is_refused(opened, what):
    make, reason = REQUESTS[what]
    pem = make()
    assert reason != "too_large" or len(pem) > MAX_REQUEST
    with pytest.raises(IssueRefused) as caught:
        opened().sign(pem, ALLOWED, NOW)
    assert caught.value.reason == reason


# --- rotation -----------------------------------------------------------------------------------


def test_the_next_root_is_published_before_it_issues(opened):
    authority = opened()
    old = authority.bundle()
    before = signed(authority)
    authority.rotate_root(NOW)
    both = authority.bundle()
    assert set(old.roots) < set(both.roots)
    version = authority.version

    # As long as a node has the old bundle, it can verify whatever is issued.
    assert authority.tick(NOW + 10, version - 1) <= NOW + 3600
    trusted(signed(authority, NOW + 10), old, both)

    # All have both: the next one issues, and what was issued before is still trusted.
    authority.tick(NOW + 20, version)
    after = signed(authority, NOW + 20)
    trusted(after, authority.bundle(), both)
    trusted(before, authority.bundle())
    with pytest.raises(NotTrusted):
        trusted(after, old)

    # The old one goes with the last that it has issued.
    authority.tick(NOW + 20 + 3599, version)
    assert len(authority.bundle().roots) == 2
    assert authority.version == version
    assert authority.tick(NOW + 20 + 3600, version) > NOW + 20 + 3600
    assert not set(authority.bundle().roots) & set(old.roots)
    assert authority.version == version + 1
    trusted(signed(authority), authority.bundle())


def test_a_node_that_never_comes_does_not_hold_up_a_root_for_ever(opened):
    authority = opened()
    old = authority.bundle()
    authority.rotate_root(NOW)
    with pytest.raises(AuthorityError, match="under way"):
        authority.rotate_root(NOW)
    authority.tick(NOW + 3599, 0)
    trusted(signed(authority), old)
    # What it held has expired by now.
    authority.tick(NOW + 3600, 0)
    with pytest.raises(NotTrusted, match="no valid path to a root"):
        trusted(signed(authority, NOW + 3600), old, now=NOW + 3600)


def test_lives_that_were_longer_count_for_rotation(opened):
    opened(lives=Lives(svid_s=7200))
    authority = opened(lives=Lives(svid_s=60))
    old = authority.bundle()
    authority.rotate_root(NOW)
    authority.tick(NOW + 1, authority.version)
    authority.tick(NOW + 7200, authority.version)
    assert set(old.roots) < set(authority.bundle().roots)
    authority.tick(NOW + 7202, authority.version)
    assert not set(old.roots) & set(authority.bundle().roots)


def test_another_intermediate(opened):
    authority = opened()
    bundle = authority.bundle()
    before = signed(authority)
    authority.rotate_intermediate(NOW)
    after = signed(authority)
    trusted(before, bundle)
    trusted(after, bundle)
    assert chain_der(before.chain_pem)[1] != chain_der(after.chain_pem)[1]
    assert authority.bundle().roots == bundle.roots


def test_authorities_are_replaced_before_they_expire(opened):
    lives = Lives(root_s=100 * DAY, intermediate_s=30 * DAY, svid_s=3600)
    authority = opened(lives=lives)
    first, now, roots = authority.bundle().roots[0], NOW, set()
    seen = authority.bundle()
    while now < NOW + 300 * DAY:
        # Whoever has the bundle of the step before trusts what is issued now.
        issued = signed(authority, now)
        assert issued.not_after == now + 3600
        trusted(issued, seen, authority.bundle(), now=now)
        seen = authority.bundle()
        roots |= set(seen.roots)
        now = max(now + 1, min(authority.tick(now, authority.version), now + DAY))
    assert len(roots) >= 4
    assert first not in authority.bundle().roots
    assert len(authority.bundle().roots) <= 2


def test_nothing_outlives_its_issuer(opened):
    authority = opened(lives=Lives(root_s=7200, intermediate_s=7200, svid_s=3600))
    assert signed(authority, NOW + 5000).not_after == NOW + 7200
    with pytest.raises(IssueRefused) as caught:
        signed(authority, NOW + 7200)
    assert caught.value.reason == "issuer_expired"


def test_a_root_that_has_expired_makes_way(opened):
    """The authority was away for as long, or the clock was put forward."""
    lives = Lives(root_s=100 * DAY, intermediate_s=30 * DAY, svid_s=3600)
    authority, late = opened(lives=lives), NOW + 200 * DAY
    assert re.search(r"Weft root .* has expired \(2027-04-25", authority.problem(late))
    assert authority.problem(NOW) == ""
    # No node has the next one; what they have is of no use to anybody.
    due = authority.tick(late, 0)
    assert due == late + 1
    with pytest.raises(IssueRefused, match=r"has expired .*: it is being replaced"):
        signed(authority, late)
    authority.tick(due, 0)
    assert authority.problem(due) == ""
    trusted(signed(authority, due), authority.bundle(), now=due)


def test_a_brought_root_that_has_expired_waits_for_another(opened):
    data = {one: secret_of(root := company()[0], root=root) for one in ("old", "new")}
    brought, late = from_secret(data["old"], "x"), LONG.not_after.timestamp()
    authority = opened(brought=brought)
    assert authority.tick(late, 0, brought) > late + DAY
    for sign in (authority.sign, authority.sign):
        with pytest.raises(IssueRefused, match=r"company root has expired .*: bring another"):
            sign(request(CART), ALLOWED, late)
    with pytest.raises(AuthorityError, match="company root has expired"):
        authority.rotate_intermediate(late)
    life = Life.between(late - 60, late + DAY)
    another = from_secret(secret_of(root := Issuer.new_root("company 2", life), root=root), "x")
    authority.tick(late, 0, another)
    authority.tick(late + 1, 0, another)
    trusted(signed(authority, late + 1), authority.bundle(), now=late + 1)
    # What has expired before it was gone over to is forgotten.
    authority.tick(late + 2, 0, from_secret(data["new"], "x"))
    assert authority.bundle().roots[0].subject == root.certificate.subject
    assert authority.tick(late + DAY, 0, another) > late + DAY


@pytest.mark.parametrize("everywhere", [0, 9], ids=["next-root", "next-root-issues"])
def test_clocks_that_are_put_forward_and_back(opened, everywhere):
    """What was made by the clock that was ahead is not valid yet, and is made again."""
    lives = Lives(root_s=100 * DAY, intermediate_s=30 * DAY, svid_s=3600)
    authority, ahead = opened(lives=lives), NOW + 85 * DAY
    authority.tick(authority.tick(ahead, everywhere), everywhere)
    chain = chain_der(signed(authority, ahead + 1).chain_pem)
    now = NOW
    while (due := authority.tick(now, 0)) < now + 3600:
        now = due
    assert now <= NOW + 2
    assert authority.problem(now) == ""
    issued = signed(authority, now)
    trusted(issued, authority.bundle(), now=now)
    assert chain_der(issued.chain_pem)[1] != chain[1]


def test_former_roots_do_not_pile_up(opened):
    authority = opened()
    for _ in range(8):
        authority.rotate_root(NOW)
        authority.tick(NOW, authority.version)
    with pytest.raises(AuthorityError, match="8 former roots are still in use"):
        authority.rotate_root(NOW)
    authority.tick(NOW + 3600, authority.version)
    authority.rotate_root(NOW)


# --- files --------------------------------------------------------------------------------------


def test_it_is_the_same_after_a_restart(opened, tmp_path):
    authority = opened()
    bundle, before = authority.bundle(), signed(authority)
    authority.rotate_root(NOW)
    described = authority.describe()
    authority = opened()
    assert authority.describe() == described
    assert set(bundle.roots) < set(authority.bundle().roots)
    trusted(before, authority.bundle())
    trusted(signed(authority), bundle)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "ca").iterdir()}
    assert modes == {"authority.json": 0o600, "lock": 0o600}
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700


def test_files_that_others_may_use_are_not_used(opened, tmp_path):
    opened()
    file = tmp_path / "ca" / "authority.json"
    for path, mode, remedy in ((file, 0o640, "chmod 600"), (tmp_path / "ca", 0o750, "chmod 700")):
        was = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(AuthorityError, match=remedy):
            opened()
        path.chmod(was)
    if os.geteuid() == 0:
        os.chown(file, 65534, 0)
        with pytest.raises(AuthorityError, match="belongs to user 65534"):
            opened()
        os.chown(file, 0, 0)
    opened()


def test_a_damaged_file_is_not_quoted(opened, tmp_path):
    opened()
    file = tmp_path / "ca" / "authority.json"
    good = file.read_text()
    key = good.split("BEGIN PRIVATE KEY-----\\n")[1][:20]
    for bad in (good[:-40], good.replace('"signer"', '"singer"'), "", "[]", good.replace("1", "x")):
        file.write_text(bad)
        with pytest.raises(AuthorityError, match="is not what an authority writes") as caught:
            opened()
        assert key not in str(caught.value)
        assert caught.value.__suppress_context__
    file.write_text(good)
    opened()
    with pytest.raises(AuthorityError, match=r"is the authority of cluster\.local, not of x"):
        opened(trust_domain="x")


def test_one_process_at_a_time(opened, tmp_path):
    opened()
    with pytest.raises(AuthorityError, match="another authority runs in"):
        Authority(tmp_path / "ca", DOMAIN, Lives(), NOW)


def test_a_step_that_cannot_be_written_is_not_done(opened, tmp_path):
    authority = opened()
    before = authority.describe()
    (tmp_path / "ca" / ".authority.json.new").mkdir()
    with pytest.raises(AuthorityError, match="cannot be written"):
        authority.rotate_root(NOW)
    with pytest.raises(AuthorityError, match="cannot be written"):
        authority.rotate_intermediate(NOW)
    assert authority.describe() == before


# Rotates as fast as it can, and prints what it has issued and for which bundle.
_ROTATE = """
import sys, pathlib, json
sys.path.insert(0, "tests")
from certs_world import CART, NOW, request
from certs.authority import Authority, Lives
from certs.spiffe import parse

def tell():
    issued = authority.sign(request(CART), {parse(CART)}, now)
    print(json.dumps([now, issued.chain_pem, authority.bundle().to_pem()]), flush=True)
    return authority.version

now = float(sys.argv[2])
authority = Authority(pathlib.Path(sys.argv[1]), "cluster.local", Lives(svid_s=60), now)
while True:
    if len(authority.bundle().roots) == 1:
        authority.rotate_root(now)
    told = tell()
    now += 20
    authority.tick(now, told)
    tell()
    authority.rotate_intermediate(now)
"""


def test_killed_in_the_middle_of_rotations(tmp_path):
    """Whatever was told before is true afterwards: what was issued is trusted until it expires, and
    what is issued then is trusted by those who have the last bundle."""
    now, directory = NOW, tmp_path / "ca"
    for lines in (1, 2, 3, 5, 8, 13):
        with subprocess.Popen(
            [sys.executable, "-c", _ROTATE, directory, str(now)], stdout=subprocess.PIPE, text=True
        ) as process:
            told = [json.loads(process.stdout.readline()) for _ in range(lines)]
            process.kill()
            told += [json.loads(line) for line in process.stdout if line.endswith("\n")]
        now, _, bundle = told[-1]
        with closing(Authority(directory, DOMAIN, Lives(svid_s=60), now)) as authority:
            for when, chain, _ in told:
                if when + 60 > now + 20:  # the step that was not told may have been done
                    peer_identity(chain_der(chain), {DOMAIN: authority.bundle()}, now)
            issued = signed(authority, now)
            trusted(issued, Bundle.from_pem(DOMAIN, bundle), authority.bundle(), now=now)
        now += 100


# --- brought -------------------------------------------------------------------------------------


def secret_of(issuer: Issuer, *above: Issuer, root: Issuer | None = None) -> dict[str, bytes]:
    """As cert-manager writes it."""

    def pem(one: Issuer) -> bytes:
        return one.certificate.public_bytes(Encoding.PEM)

    data = {"tls.crt": b"".join(map(pem, (issuer, *above))), "tls.key": issuer.key_pem()}
    return data if root is None else {**data, "ca.crt": pem(root)}


def as_files(directory, data):
    directory.mkdir(exist_ok=True)
    for name, content in data.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o600)
    return directory


def company():
    root = Issuer.new_root("company root", LONG)
    return root, root.new_intermediate("company mesh", LONG)


def test_a_root_that_is_brought(opened, tmp_path):
    root, _ = company()
    brought = from_directory(as_files(tmp_path / "brought", secret_of(root, root=root)))
    authority = opened(brought=brought)
    assert authority.bundle().roots == (root.certificate,)
    issued = signed(authority)
    trusted(issued, authority.bundle())
    assert len(chain_der(issued.chain_pem)) == 2
    # Made under it again and again; the root is for its owner to replace.
    authority.rotate_intermediate(NOW)
    trusted(signed(authority), authority.bundle())
    assert authority.tick(NOW, 0, brought) > NOW
    assert authority.bundle().roots == (root.certificate,)
    # After a restart as well.
    trusted(signed(opened(brought=brought)), authority.bundle())


def test_an_intermediate_that_is_brought(opened):
    root, mesh = company()
    authority = opened(brought=from_secret(secret_of(mesh, root=root), "x"))
    issued = signed(authority)
    trusted(issued, authority.bundle())
    assert chain_der(issued.chain_pem)[1] == mesh.certificate.public_bytes(Encoding.DER)
    with pytest.raises(AuthorityError, match="renew it where it comes from"):
        authority.rotate_intermediate(NOW)

    # Renewed under the same root: taken over at once.
    renewed = root.new_intermediate("company mesh", LONG)
    bundle = authority.bundle()
    authority.tick(NOW, 0, from_secret(secret_of(renewed, root=root), "x"))
    assert chain_der(signed(authority).chain_pem)[1] == renewed.certificate.public_bytes(
        Encoding.DER
    )
    trusted(signed(authority), bundle)


def test_an_intermediate_below_others(opened):
    root = Issuer.new_root("company root", LONG)
    department = _authority_below(root, "department")
    mesh = department.new_intermediate("mesh", LONG)
    for root_is in ("in ca.crt", "in tls.crt"):
        data = (
            secret_of(mesh, department, root=root)
            if root_is == "in ca.crt"
            else secret_of(mesh, department, root)
        )
        authority = opened(root_is.replace(" ", "-"), brought=from_secret(data, "x"))
        assert authority.bundle().roots == (root.certificate,)
        issued = signed(authority)
        assert len(chain_der(issued.chain_pem)) == 3
        trusted(issued, authority.bundle())


def _authority_below(root: Issuer, name: str) -> Issuer:
    """An intermediate that may have intermediates."""
    key = ec.generate_private_key(ec.SECP256R1())
    model = Issuer.new_root(name, LONG).certificate
    builder = (
        x509.CertificateBuilder()
        .subject_name(model.subject)
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(LONG.not_before)
        .not_valid_after(LONG.not_after)
    )
    for extension in model.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    return Issuer(root._sign(builder), key)


def test_going_over_to_what_is_brought(opened):
    """From our own root to a company's, as in any rotation."""
    authority = opened()
    own = authority.bundle()
    before = signed(authority)
    root, mesh = company()
    brought = from_secret(secret_of(mesh, root=root), "x")
    authority.tick(NOW, authority.version, brought)
    both = authority.bundle()
    assert set(both.roots) == {*own.roots, root.certificate}
    trusted(signed(authority), own)
    authority.tick(NOW + 1, authority.version, brought)
    trusted(signed(authority), both)
    trusted(before, authority.bundle())
    authority.tick(NOW + 3700, authority.version, brought)
    assert authority.bundle().roots == (root.certificate,)


def _bad_secrets():
    root, mesh = company()
    other_root, other = company()
    leaf_domain = Domain(DOMAIN)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = {
        "tls.crt": leaf_domain.leaf(CART, key=key).public_bytes(Encoding.PEM),
        "tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    old = Issuer.new_root("old", Life.between(NOW - 9e8, NOW - 8e8))
    good = secret_of(mesh, root=root)
    return {
        "tls.crt is missing": {"tls.key": good["tls.key"]},
        "tls.key is missing": {"tls.crt": good["tls.crt"], "tls.key": b""},
        "does not belong": {**good, "tls.key": other.key_pem()},
        "not a PEM private key": {**good, "tls.key": b"garbage"},
        "holds no PEM certificate": {**good, "tls.crt": b"garbage"},
        "is not a certificate of an authority": leaf,
        "tls.crt has expired": secret_of(old),
        "holds no root": secret_of(mesh),
        "does not lead to a root in ca.crt": secret_of(mesh, root=other_root),
        "holds something else": {**good, "ca.crt": b"garbage"},
    }


BAD_SECRETS = _bad_secrets()


def test_a_secret_in_a_manifest(tmp_path):
    root, mesh = company()
    data = {
        name: base64.b64encode(content).decode()
        for name, content in secret_of(mesh, root=root).items()
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ca"}, "data": data}
    file = tmp_path / "ca.json"
    file.write_text(json.dumps(secret))
    with pytest.raises(AuthorityError, match=r"ca.json has mode 0644.*chmod 600"):
        read_brought(file)
    file.chmod(0o600)
    assert read_brought(file) == from_secret(secret_of(mesh, root=root), "x")
    file.write_text(json.dumps({**secret, "kind": "ConfigMap"}))
    with pytest.raises(AuthorityError, match=r"ca\.json: ") as caught:
        read_brought(file)
    assert data["tls.key"][:30] not in str(caught.value)
    with pytest.raises(AuthorityError, match="cannot be read"):
        read_brought(tmp_path / "none.yaml")


@pytest.mark.parametrize("words", BAD_SECRETS)
def test_what_cannot_be_brought(words):
    data = BAD_SECRETS[words]
    with pytest.raises(AuthorityError, match=words) as caught:
        from_secret(data, "secret.yaml")
    assert "secret.yaml" in str(caught.value)
    for line in data.get("tls.key", b"").decode().splitlines()[1:-1]:
        assert line not in str(caught.value)


def test_a_key_that_others_may_read_is_not_brought(tmp_path):
    root, _ = company()
    directory = as_files(tmp_path / "brought", secret_of(root))
    (directory / "tls.key").chmod(0o644)
    with pytest.raises(AuthorityError, match=r"tls.key has mode 0644.*chmod 600"):
        from_directory(directory)
