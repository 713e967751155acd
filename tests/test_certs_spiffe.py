"""SPIFFE IDs and the server names made of them (SPIFFE-ID.md section 2)."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.spiffe import BadSpiffeId, SpiffeId, from_sni, gateway, parse, to_sni, workload


@pytest.mark.parametrize(
    ("text", "trust_domain", "path"),
    [
        ("spiffe://cluster.local/ns/shop/sa/cart", "cluster.local", "/ns/shop/sa/cart"),
        ("spiffe://example.org", "example.org", ""),
        ("spiffe://a_b-c.1/A.b_c-1", "a_b-c.1", "/A.b_c-1"),
        ("spiffe://x/...", "x", "/..."),
        (f"spiffe://{'a' * 255}/x", "a" * 255, "/x"),
        ("spiffe://x/" + "a" * 2037, "x", "/" + "a" * 2037),
    ],
)
def test_what_is_one(text, trust_domain, path):
    assert parse(text) == (trust_domain, path)
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe:///ns/a/sa/b",
        "SPIFFE://x/a",
        "https://x/a",
        "spiffe:x/a",
        "spiffe://X/a",
        "spiffe://x:80/a",
        "spiffe://user@x/a",
        "spiffe://x/a?query",
        "spiffe://x/a#fragment",
        "spiffe://x/a%2fb",
        "spiffe://x%41/a",
        "spiffe://x/",
        "spiffe://x/a/",
        "spiffe://x/a//b",
        "spiffe://x/./a",
        "spiffe://x/a/..",
        "spiffe://x/ä",
        "spiffe://ä/x",
        "spiffe://x/a b",
        "spiffe://x/a\n",
        "spiffe://x\n/a",
        "spiffe://x/a\0",
        "spiffe://[::1]/a",
        f"spiffe://{'a' * 256}/x",
        "spiffe://x/" + "a" * 2038,
    ],
)
def test_what_is_none(text):
    with pytest.raises(BadSpiffeId):
        parse(text)


def test_workloads():
    cart = workload("cluster.local", "shop", "cart")
    assert str(cart) == "spiffe://cluster.local/ns/shop/sa/cart"
    assert cart.workload == ("shop", "cart")
    assert parse("spiffe://x/ns/a/sa").workload is None
    assert parse("spiffe://x/ns/a/sa/b/c").workload is None
    assert parse("spiffe://x/sa/a/ns/b").workload is None
    assert gateway("x").workload == ("weft-system", "weft-gateway")
    for names in (("", "b"), ("a/b", "c"), ("a", "..")):
        with pytest.raises(BadSpiffeId):
            workload("x", *names)


def test_server_names():
    name = to_sni(workload("cluster.local", "shop", "cart"))
    assert name == "sa.cart.ns.shop.cluster.local"
    assert from_sni(name) == workload("cluster.local", "shop", "cart")
    dotted = workload("example.org", "shop", "cart.v1")
    assert from_sni(to_sni(dotted)) == dotted


@pytest.mark.parametrize(
    "name",
    [
        "",
        "www.example.com",
        "sa.cart.ns.shop",
        "sa..ns.shop.x",
        "sa.cart.ns..x",
        "xsa.cart.ns.shop.x",
        "sa.cart.ns.shop.x.",
        "sa.cart.ns.shop.X",
        f"sa.{'a' * 64}.ns.shop.x",
        "sa.cart.ns.shop." + ".".join(["a" * 60] * 5),
    ],
)
def test_server_names_that_ask_for_no_workload(name):
    assert from_sni(name) is None


@pytest.mark.parametrize(
    "spiffe_id",
    [
        parse("spiffe://x/other"),
        workload("x", "shop", "a.ns.b"),  # would be read as a of b.ns.shop
        workload("x", "shop", "a.ns"),
        workload("x", "shop", "a" * 64),
        workload("x", "Shop", "a"),
    ],
)
def test_what_cannot_be_a_server_name(spiffe_id):
    with pytest.raises(BadSpiffeId):
        to_sni(spiffe_id)


_LABEL = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=8)
_DOTTED = st.lists(st.one_of(_LABEL, st.sampled_from(["ns", "sa"])), min_size=1, max_size=4).map(
    ".".join
)


@given(_DOTTED, _LABEL, _DOTTED)
def test_a_server_name_means_one_identity(trust_domain, namespace, account):
    """Either the very same one comes back, or it cannot be written."""
    spiffe_id = workload(trust_domain, namespace, account)
    try:
        name = to_sni(spiffe_id)
    except BadSpiffeId:
        assert ".ns." in f"{account}."
        return
    assert from_sni(name) == spiffe_id


@given(st.text(max_size=60))
def test_whatever_is_asked_for(text):
    found = from_sni(text)
    assert found is None or (isinstance(found, SpiffeId) and to_sni(found) == text)
