"""Forwarding fields: nobody but our own proxies can say who the client is."""

from __future__ import annotations

import pytest

from l7proxy import forwarding
from l7proxy.field_rules import Refused
from l7proxy.message import Headers, RequestHead
from l7proxy.streams import ConnectionInfo
from mesh.model.nodeconfig import Settings

FORGED = [
    (b"x-forwarded-for", b"6.6.6.6"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"admin.internal"),
    (b"x-forwarded-port", b"1"),
    (b"x-forwarded-anything", b"1"),
    (b"x-forwarded-client-cert", b"URI=spiffe://td/ns/admin"),
    (b"forwarded", b"for=6.6.6.6"),
    (b"via", b"1.0 evil"),
    (b"x-real-ip", b"6.6.6.6"),
    (b"x-request-id", b"mine"),
]


def sent(
    headers: Headers, peer: str = "10.0.0.1", version: bytes = b"1.1", **settings: object
) -> tuple[dict[bytes, bytes], forwarding.ClientAddress]:
    head = RequestHead(
        b"GET", b"http", b"a.com:81", b"/", None, [(b"accept", b"*/*"), *headers], version=version
    )
    client = forwarding.apply(
        head, ConnectionInfo((peer, 1234), ("10.9.9.9", 8080)), Settings(**settings)
    )
    names = [name for name, _ in head.headers]
    assert len(set(names)) == len(names)
    return dict(head.headers), client


def test_of_strangers_nothing_is_believed() -> None:
    headers, client = sent(FORGED)
    request_id = headers.pop(b"x-request-id")
    assert headers == {
        b"accept": b"*/*",
        b"x-forwarded-for": b"10.0.0.1",
        b"x-forwarded-proto": b"http",
        b"x-forwarded-host": b"a.com:81",
        b"x-forwarded-port": b"8080",
        b"via": b"1.1 weft",
    }
    assert client == forwarding.ClientAddress("10.0.0.1", request_id.decode(), False)
    assert len(request_id) == 32
    assert request_id != sent(FORGED)[0][b"x-request-id"]


def test_of_our_proxies_everything_but_the_identity_stands_and_is_added_to() -> None:
    headers, client = sent(FORGED, trusted_hops=1, version=b"2")
    assert headers == {
        b"accept": b"*/*",
        b"x-forwarded-for": b"6.6.6.6, 10.0.0.1",
        b"x-forwarded-proto": b"https",
        b"x-forwarded-host": b"admin.internal",
        b"x-forwarded-port": b"1",
        b"x-forwarded-anything": b"1",
        b"forwarded": b'for=6.6.6.6, for=10.0.0.1;host="a.com:81";proto=http',
        b"via": b"1.0 evil, 2 weft",
        b"x-real-ip": b"6.6.6.6",
        b"x-request-id": b"mine",
    }
    assert client == forwarding.ClientAddress("6.6.6.6", "mine", True)


def test_forwarded_is_continued_with_quoted_ipv6_but_not_begun() -> None:
    headers, _ = sent([(b"forwarded", b"for=a")], peer="2001:db8::1", trusted_hops=1)
    assert headers[b"forwarded"] == b'for=a, for="[2001:db8::1]";host="a.com:81";proto=http'
    assert b"forwarded" not in sent([], trusted_hops=1)[0]


RANGES = {"trusted_ranges": ("10.0.0.0/8", "2001:db8::/32")}


@pytest.mark.parametrize(
    ("settings", "peer", "chain", "address"),
    [
        ({}, "10.0.0.1", "1.1.1.1", "10.0.0.1"),
        # So many hops back, or as many as there are.
        ({"trusted_hops": 1}, "10.0.0.1", "", "10.0.0.1"),
        ({"trusted_hops": 1}, "10.0.0.1", "1.1.1.1, 2.2.2.2", "2.2.2.2"),
        ({"trusted_hops": 2}, "10.0.0.1", "1.1.1.1, 2.2.2.2", "1.1.1.1"),
        ({"trusted_hops": 3}, "10.0.0.1", "1.1.1.1, 2.2.2.2", "1.1.1.1"),
        # Back over all that is ours.
        (RANGES, "10.0.0.1", "1.1.1.1, 2.2.2.2", "2.2.2.2"),
        (RANGES, "10.0.0.1", "1.1.1.1, 2.2.2.2, 10.3.3.3, 2001:db8::7", "2.2.2.2"),
        (RANGES, "10.0.0.1", "10.1.1.1, 10.3.3.3", "10.1.1.1"),
        (RANGES, "11.0.0.1", "1.1.1.1", "11.0.0.1"),
        (RANGES, "2001:db8::1", "1.1.1.1", "1.1.1.1"),
        (RANGES | {"trusted_hops": 1}, "10.0.0.1", "1.1.1.1, 10.2.2.2", "10.2.2.2"),
        (RANGES | {"trusted_hops": 5}, "10.0.0.1", "1.1.1.1, 2.2.2.2", "2.2.2.2"),
        # How addresses are written.
        (RANGES, "10.0.0.1", "1.1.1.1:4711", "1.1.1.1"),
        (RANGES, "10.0.0.1", "[2001:DB9::1]:4711", "2001:db9::1"),
        (RANGES, "10.0.0.1", "2001:db9::1", "2001:db9::1"),
        # What is no address ends the walk.
        (RANGES, "10.0.0.1", "1.1.1.1, unknown, 10.2.2.2", "10.2.2.2"),
        (RANGES, "10.0.0.1", "1.1.1.1,", "10.0.0.1"),
        ({"trusted_hops": 9}, "10.0.0.1", "1.1.1.1, _x, <script>", "10.0.0.1"),
    ],
)
def test_the_clients_address(
    settings: dict[str, object], peer: str, chain: str, address: str
) -> None:
    headers = [(b"x-forwarded-for", chain.encode())] if chain else []
    assert sent(headers, peer, **settings)[1].address == address
    # The same in lines of their own.
    lines = [(b"x-forwarded-for", item.encode()) for item in chain.split(", ") if item]
    assert sent(lines, peer, **settings)[1].address == address


@pytest.mark.parametrize("request_id", [b"", b"a b", b"x" * 129, b"caf\xe9"])
def test_odd_request_ids_are_replaced(request_id: bytes) -> None:
    headers, client = sent([(b"x-request-id", request_id)], trusted_hops=1)
    assert len(client.request_id) == 32
    assert headers[b"x-request-id"] == client.request_id.encode()


def test_without_authority_no_host_is_told() -> None:
    head = RequestHead(b"GET", b"http", b"", b"/", None, [], version=b"1.0")
    info = ConnectionInfo(("10.0.0.1", 1), ("10.9.9.9", 80))
    forwarding.apply(head, info, Settings())
    headers = dict(head.headers)
    assert b"x-forwarded-host" not in headers
    assert headers[b"via"] == b"1.0 weft"


@pytest.mark.parametrize(
    "settings", [Settings(trusted_ranges=("10.0.0.0/8", "nonsense")), Settings(trusted_hops=-1)]
)
def test_settings_that_mean_nothing_are_refused(settings: Settings) -> None:
    with pytest.raises(Refused, match="trusted_"):
        forwarding.check(settings)
    forwarding.check(Settings(trusted_ranges=("10.0.0.1/8", "::1")))


def test_a_range_that_is_none_trusts_nobody() -> None:
    assert not sent([], trusted_ranges=("nonsense",), trusted_hops=3)[1].trusted
