"""Who a peer is by its certificate: what is an X.509-SVID, and every way in which one is not."""

from __future__ import annotations

import pytest
from certs_world import CART, LIFE, LONG, NOW, Domain, der, request, usage
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from certs.bundle import BadBundle, Bundle
from certs.errors import NotTrusted
from certs.issue import Issuer, Life
from certs.spiffe import parse, workload
from certs.svid import holds, new_request, peer_identity

HOME = Domain("cluster.local")
AWAY = Domain("example.org")
BUNDLES = {"cluster.local": HOME.bundle, "example.org": AWAY.bundle}
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
EXPIRED = Life.between(NOW - 7200, NOW - 1)
FUTURE = Life.between(NOW + 1, NOW + 3600)


def refused(chain, bundles=BUNDLES, now=NOW, expected=None):
    with pytest.raises(NotTrusted) as caught:
        peer_identity(chain, bundles, now, expected)
    assert caught.value.why == str(caught.value)
    return caught.value.reason


def test_svids_of_several_trust_domains():
    assert peer_identity(HOME.chain(CART), BUNDLES, NOW) == parse(CART)
    away = "spiffe://example.org/anything/else"
    assert peer_identity(AWAY.chain(away), BUNDLES, NOW, parse(away)) == parse(away)


def test_a_leaf_of_our_own_issuer():
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = HOME.intermediate.svid(key.public_key(), parse(CART), LIFE)
    assert peer_identity(der(leaf, HOME.intermediate.certificate), BUNDLES, NOW) == parse(CART)


def test_several_roots_in_a_bundle():
    other = Domain("cluster.local")
    both = Bundle("cluster.local", [HOME.root.certificate, other.root.certificate])
    for domain in (HOME, other):
        assert peer_identity(domain.chain(CART), {"cluster.local": both}, NOW) == parse(CART)


# Everything that a certificate can have wrong by itself, properly signed.
NOT_SVIDS = {
    "two URIs": lambda: HOME.chain(CART, CART.replace("cart", "web")),
    "the same URI twice": lambda: HOME.chain(CART, CART),
    "no names": lambda: HOME.chain(),
    "another scheme": lambda: HOME.chain("https://cluster.local/ns/shop/sa/cart"),
    "no workload": lambda: HOME.chain("spiffe://cluster.local"),
    "a dot segment": lambda: HOME.chain("spiffe://cluster.local/ns/shop/sa/../cart"),
    "an authority": lambda: HOME.chain(CART, ca=True),
    "keyCertSign": lambda: HOME.chain(
        CART, key_usage=usage(digital_signature=True, key_cert_sign=True)
    ),
    "cRLSign": lambda: HOME.chain(CART, key_usage=usage(digital_signature=True, crl_sign=True)),
    "no digitalSignature": lambda: HOME.chain(CART, key_usage=usage(key_agreement=True)),
    "key usage not critical": lambda: HOME.chain(CART, critical=False),
    "servers only": lambda: HOME.chain(CART, purposes=[SERVER]),
    "for no purpose": lambda: HOME.chain(CART, purposes=None),
}


@pytest.mark.parametrize("what", NOT_SVIDS)
def test_not_an_svid(what):
    assert refused(NOT_SVIDS[what]()) == "not_an_svid"


def test_a_trust_domain_that_nobody_knows():
    assert refused(Domain("evil.test").chain("spiffe://evil.test/x")) == "wrong_trust_domain"
    assert refused(HOME.chain(CART), {}) == "wrong_trust_domain"


def test_a_root_vouches_for_its_own_trust_domain_only():
    """Both are trusted, each for itself."""
    assert refused(AWAY.chain(CART)) == "unknown_issuer"
    assert refused(HOME.chain("spiffe://example.org/ns/shop/sa/cart")) == "unknown_issuer"


def test_lifetimes():
    assert refused(HOME.chain(CART, life=EXPIRED)) == "expired"
    assert refused(HOME.chain(CART, life=FUTURE)) == "not_yet_valid"
    edge = HOME.chain(CART)
    end = LIFE.not_after.timestamp()
    assert peer_identity(edge, BUNDLES, end) == parse(CART)
    assert refused(edge, now=end + 1) == "expired"
    old = Domain("cluster.local", intermediate_life=EXPIRED)
    assert refused(old.chain(CART), {"cluster.local": old.bundle}) == "expired"
    new = Domain("cluster.local", intermediate_life=FUTURE)
    assert refused(new.chain(CART), {"cluster.local": new.bundle}) == "not_yet_valid"
    gone = Domain("cluster.local", life=EXPIRED)
    assert refused(gone.chain(CART), {"cluster.local": gone.bundle}) == "unknown_issuer"


def test_self_signed():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    leaf = Issuer(HOME.leaf(CART, key=key), key).svid(key.public_key(), parse(CART), LIFE)
    assert leaf.subject == name
    assert refused(der(leaf)) == "unknown_issuer"
    assert refused(der(leaf, HOME.intermediate.certificate)) == "unknown_issuer"


def test_another_root_of_the_same_name():
    """The same subject and trust domain, other keys."""
    assert refused(Domain("cluster.local").chain(CART)) == "unknown_issuer"
    mixed = [Domain("cluster.local").chain(CART)[0], HOME.chain(CART)[1]]
    assert refused(mixed) == "unknown_issuer"


def test_a_workload_is_no_authority():
    """One who holds an SVID issues another one with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = HOME.leaf("spiffe://cluster.local/ns/shop/sa/web", key=key)
    forged = Issuer(own, key).svid(
        ec.generate_private_key(ec.SECP256R1()).public_key(), parse(CART), LIFE
    )
    assert refused(der(forged, own, HOME.intermediate.certificate)) == "unknown_issuer"


def test_an_intermediate_makes_no_intermediates():
    below = HOME.intermediate.new_intermediate("below", LONG)
    leaf = below.svid(ec.generate_private_key(ec.SECP256R1()).public_key(), parse(CART), LIFE)
    chain = der(leaf, below.certificate, HOME.intermediate.certificate)
    assert refused(chain) == "unknown_issuer"


def test_a_critical_extension_that_nobody_understands():
    more = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\x00")
    assert refused(HOME.chain(CART, more=more)) == "unknown_issuer"


def test_the_chain_must_be_there():
    assert refused(HOME.chain(CART)[:1]) == "unknown_issuer"
    assert refused([]) == "no_certificate"
    assert refused([b"garbage"]) == "no_certificate"
    assert refused([HOME.chain(CART)[0], b""]) == "no_certificate"
    assert refused(HOME.chain(CART) * 3) == "unknown_issuer"


def test_a_certificate_of_no_version_that_there_is():
    """What `cryptography` says of it is no ValueError."""
    leaf, intermediate = HOME.chain(CART)
    version = b"\xa0\x03\x02\x01\x02"
    assert leaf.count(version) == intermediate.count(version) == 1
    for chain in (
        [leaf.replace(version, b"\xa0\x03\x02\x01\x03"), intermediate],
        [leaf, intermediate.replace(version, b"\xa0\x03\x02\x01\x03")],
    ):
        assert refused(chain) == "no_certificate"


def test_somebody_else():
    cart, web = workload("cluster.local", "shop", "cart"), workload("cluster.local", "shop", "web")
    assert peer_identity(HOME.chain(CART), BUNDLES, NOW, cart) == cart
    assert refused(HOME.chain(CART), expected=web) == "wrong_identity"
    # Who it is counts less than whether it is anybody.
    assert refused(HOME.chain(CART, life=EXPIRED), expected=web) == "expired"


_CHAIN = HOME.chain(CART)


@given(st.integers(0, 1), st.integers(0, 100_000))
def test_one_flipped_bit(which, at):
    """Whatever comes out is a refusal or the same identity, and nothing else is raised."""
    chain = list(_CHAIN)
    damaged = bytearray(chain[which])
    damaged[at // 8 % len(damaged)] ^= 1 << at % 8
    chain[which] = bytes(damaged)
    try:
        assert peer_identity(chain, BUNDLES, NOW) == parse(CART)
    except NotTrusted:
        pass


def test_requests_and_what_comes_of_them():
    key_pem, csr_pem = new_request(parse(CART))
    csr = x509.load_pem_x509_csr(csr_pem.encode())
    assert csr.is_signature_valid
    key = load_pem_private_key(key_pem.encode(), None)
    assert csr.public_key() == key.public_key()
    leaf = HOME.intermediate.svid(csr.public_key(), parse(CART), LIFE)
    pem = b"".join(
        one.public_bytes(Encoding.PEM) for one in (leaf, HOME.intermediate.certificate)
    ).decode()
    assert holds(pem, key_pem, parse(CART), BUNDLES, NOW) == leaf
    other_key, _ = new_request(parse(CART))
    for wrong in (
        (pem, other_key, parse(CART)),
        (pem, key_pem, parse(CART.replace("cart", "web"))),
        ("garbage", key_pem, parse(CART)),
        (pem, "garbage", parse(CART)),
    ):
        with pytest.raises(NotTrusted) as caught:
            holds(*wrong, BUNDLES, NOW)
        assert key_pem.splitlines()[1] not in str(caught.value)


def test_bundles_as_documents():
    both = Bundle(
        "cluster.local", [HOME.root.certificate, Domain("cluster.local").root.certificate]
    )
    document = both.to_document(7, 300)
    again = Bundle.from_document("cluster.local", document)
    assert again.roots == both.roots
    assert b'"spiffe_sequence": 7' in document
    assert b'"use": "x509-svid"' in document
    assert Bundle.from_pem("cluster.local", both.to_pem()).roots == both.roots


def _without_authority() -> str:
    return HOME.leaf(CART).public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bundle.from_pem("Upper", HOME.bundle.to_pem()),
        lambda: Bundle.from_pem("cluster.local", ""),
        lambda: Bundle.from_pem("cluster.local", "garbage"),
        lambda: Bundle.from_pem("cluster.local", request(CART)),
        lambda: Bundle.from_pem("cluster.local", _without_authority()),
        lambda: Bundle("cluster.local", [Domain("x").root.certificate for _ in range(33)]),
        lambda: Bundle.from_document("cluster.local", "[]"),
        lambda: Bundle.from_document("cluster.local", "{}"),
        lambda: Bundle.from_document("cluster.local", '{"keys": []}'),
        lambda: Bundle.from_document("cluster.local", '{"keys": [{"use": "jwt-svid"}]}'),
        lambda: Bundle.from_document("x", '{"keys": [{"use": "x509-svid"}]}'),
        lambda: Bundle.from_document("x", '{"keys": [{"use": "x509-svid", "x5c": ["!"]}]}'),
        lambda: Bundle.from_document("x", '{"keys": [{"use": "x509-svid", "x5c": ["AAAA"]}]}'),
    ],
)
def test_bundles_that_cannot_be_used(make):
    with pytest.raises(BadBundle):
        make()
