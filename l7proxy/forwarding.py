"""Who the client is, and what upstreams are told of it: X-Forwarded-*, Forwarded, Via and
X-Request-Id.

A direct peer is one of our own proxies if it is in `Settings.trusted_ranges`; without ranges, if
`trusted_hops` is not 0. What such a peer says of the client stands and is added to; of any other
client it is removed and set anew. X-Forwarded-Client-Cert never passes: it is reserved for
identities the proxy has verified. No I/O.
"""

from __future__ import annotations

import ipaddress
import random
import re
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from l7proxy.field_rules import Refused
from l7proxy.message import Headers, RequestHead
from l7proxy.streams import ConnectionInfo
from mesh.model.nodeconfig import Settings

_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Fields beside x-forwarded-* by which a client could pose as another.
_CLAIMS = frozenset((b"forwarded", b"via", b"x-real-ip", b"x-request-id"))
_RESERVED = b"x-forwarded-client-cert"
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class ClientAddress(NamedTuple):
    """`address`: the client's, as far as trusted proxies tell; `trusted`: whether the direct peer
    is such a proxy."""

    address: str
    request_id: str
    trusted: bool


def check(settings: Settings) -> None:
    """Refused: a trusted range is not one."""
    for i, text in enumerate(settings.trusted_ranges):
        if _network(text) is None:
            raise Refused(f"trusted_ranges[{i}]: {text!r} is not a range (address/prefix length)")
    if settings.trusted_hops < 0:
        raise Refused(f"trusted_hops: {settings.trusted_hops} is negative")


def new_request_id() -> str:
    """Unlike any other; it need not be a secret."""
    return f"{random.getrandbits(128):032x}"


def apply(head: RequestHead, info: ConnectionInfo, settings: Settings) -> ClientAddress:
    """Set the forwarding fields of a client's request in place."""
    peer = info.peer[0]
    if _trusted(peer, settings):
        return _continue(head, info, settings)
    request_id = new_request_id()
    headers = [
        item
        for item in head.headers
        if item[0] not in _CLAIMS and not item[0].startswith(b"x-forwarded-")
    ]
    headers += _told(head.scheme, head.authority, info)
    headers += _named(peer, head.version)
    headers.append((b"x-request-id", request_id.encode()))
    head.headers = headers
    return ClientAddress(peer, request_id, False)


def standing(info: ConnectionInfo, authority: bytes, settings: Settings) -> bytes | None:
    """The field lines that `apply` adds to a request of HTTP/1.1 for this authority that says
    nothing of its client, up to the value of the last one, which is a new request id. None: that
    depends on the request."""
    if _trusted(info.peer[0], settings):
        return None
    scheme = b"https" if info.tls else b"http"
    fields = _told(scheme, authority, info) + _named(info.peer[0], b"1.1")
    return b"".join(b"%b: %b\r\n" % field for field in fields) + b"x-request-id: "


def _trusted(peer: str, settings: Settings) -> bool:
    ranges = settings.trusted_ranges
    return _in_ranges(peer, ranges) if ranges else settings.trusted_hops > 0


def _named(peer: str, version: bytes) -> Headers:
    return [(b"x-forwarded-for", peer.encode()), (b"via", version + b" weft")]


def pass_on(head: RequestHead, info: ConnectionInfo) -> ClientAddress:
    """A request between workloads goes on as it was sent; only the reserved field is taken out."""
    take_off(head)
    return ClientAddress(info.peer[0], request_id(head), False)


def take_off(head: RequestHead) -> bool:
    """Take out the field that is reserved; whether it was there."""
    before = head.headers
    if not any(name == _RESERVED for name, _ in before):
        return False
    head.headers = [item for item in before if item[0] != _RESERVED]
    return True


def request_id(head: RequestHead) -> str:
    """What the request says that it is called; "" nothing."""
    said = _value(head.headers, b"x-request-id")
    return said_id(said) if said is not None else ""


def said_id(value: bytes) -> str:
    """X-Request-Id's value, if it is one; "" else."""
    return value.decode() if _REQUEST_ID.fullmatch(value) else ""


def tell_client(head: RequestHead, address: str | None, identity: str) -> None:
    """Tell a mesh backend who its client is, as its route or workload asks: the address (None: it
    stands there), and the SPIFFE ID if that is known (""). Whatever the client said of that itself
    goes."""
    headers = [item for item in head.headers if item[0] != _RESERVED]
    if address is not None:
        headers = [item for item in headers if item[0] != b"x-forwarded-for"]
        headers.append((b"x-forwarded-for", address.encode()))
    if identity:
        headers.append((_RESERVED, b"URI=" + identity.encode()))
    head.headers = headers


def _told(scheme: bytes, authority: bytes, info: ConnectionInfo) -> Headers:
    """How the client's request came to us; the first of our proxies tells it."""
    told = [(b"x-forwarded-proto", scheme), (b"x-forwarded-port", b"%d" % info.local[1])]
    if authority:
        told.append((b"x-forwarded-host", authority))
    return told


def _continue(head: RequestHead, info: ConnectionInfo, settings: Settings) -> ClientAddress:
    """Add to what our own proxy in front says."""
    peer = info.peer[0]
    headers = [item for item in head.headers if item[0] != _RESERVED]
    address = _client(_chain(headers), peer, settings)
    headers += [
        item
        for item in _told(head.scheme, head.authority, info)
        if _value(headers, item[0]) is None
    ]
    _append(headers, b"x-forwarded-for", peer.encode())
    if _value(headers, b"forwarded") is not None:
        _append(headers, b"forwarded", _element(peer, head))
    _append(headers, b"via", head.version + b" weft")
    request_id = _value(headers, b"x-request-id")
    if request_id is None or not _REQUEST_ID.fullmatch(request_id):
        request_id = new_request_id().encode()
        headers = [item for item in headers if item[0] != b"x-request-id"]
        headers.append((b"x-request-id", request_id))
    head.headers = headers
    return ClientAddress(address, request_id.decode(), True)


# --- the client's address -----------------------------------------------------------------------


def _chain(headers: Headers) -> list[bytes]:
    """The addresses that X-Forwarded-For names, the client first."""
    joined = b",".join(value for name, value in headers if name == b"x-forwarded-for")
    return [item.strip() for item in joined.split(b",")] if joined else []


def _client(chain: list[bytes], peer: str, settings: Settings) -> str:
    """Walk back from the peer over our own proxies: by ranges, or by their number, or, with both,
    no farther than either allows. What is no address ends the walk."""
    ranges, hops = settings.trusted_ranges, settings.trusted_hops
    address = peer
    for steps, item in enumerate(reversed(chain), start=1):
        if ranges and not _in_ranges(address, ranges):
            break
        if hops and steps > hops:
            break
        named = _address(item)
        if named is None:
            break
        address = named
    return address


def _address(item: bytes) -> str | None:
    """The address of "192.0.2.1", "192.0.2.1:80", "2001:db8::1" or "[2001:db8::1]:80"."""
    text = item.decode("latin-1")
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


@lru_cache(maxsize=4096)
def _in_ranges(address: str, ranges: tuple[str, ...]) -> bool:
    parsed = ipaddress.ip_address(address)
    networks = (_network(text) for text in ranges)
    return any(network is not None and parsed in network for network in networks)


@lru_cache(maxsize=256)
def _network(text: str) -> _Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


# --- fields -------------------------------------------------------------------------------------


def _value(headers: Headers, name: bytes) -> bytes | None:
    return next((value for field, value in headers if field == name), None)


def _append(headers: Headers, name: bytes, value: bytes) -> None:
    """Add to a list-valued field, all of it in one line: not every backend reads more."""
    lines = [old for field, old in headers if field == name and old]
    headers[:] = [item for item in headers if item[0] != name]
    headers.append((name, b", ".join((*lines, value))))


def _element(peer: str, head: RequestHead) -> bytes:
    """Our element of Forwarded (RFC 7239 §4): IPv6 addresses and hosts with a port are quoted."""
    node = b'"[%s]"' % peer.encode() if ":" in peer else peer.encode()
    element = b"for=" + node
    if head.authority:
        element += b';host="%s"' % head.authority.replace(b"\\", b"").replace(b'"', b"")
    return element + b";proto=" + head.scheme
