"""A request that went past the proxy, as far as the kernel knows it. No I/O."""

from __future__ import annotations

from typing import NamedTuple

from bpf.structs import Exchange
from l7proxy.message import RequestHead

_NS = 1e-9
# Fields that are told of, and no more: what a head begins with is not all of it.
_TOLD = (b"user-agent", b"x-request-id")


class Begun(NamedTuple):
    """`head`: as far as it is known; `started`: by time.monotonic(); `bytes_in`: of its body;
    `egress`, `ingress`: the numbers of the policy rules that let it pass. Of its response, as far
    as that went there too: `status` (0: nothing did) and `bytes_out` of its body."""

    head: RequestHead
    started: float
    bytes_in: int = 0
    egress: int = 0
    ingress: int = 0
    status: int = 0
    bytes_out: int = 0


class Shown(NamedTuple):
    """What can be read in the beginning of a request that the kernel has let pass. `fields`: the
    lines that are whole, by their names in lower case."""

    method: bytes
    target: bytes
    fields: dict[bytes, bytes]


def shown(head: bytes) -> Shown:
    line, _, rest = head.partition(b"\r\n")
    method, _, target = line.partition(b" ")
    fields = {}
    for field in rest.split(b"\r\n")[:-1]:
        name, _, value = field.partition(b":")
        fields[name.lower()] = value.strip(b" \t")
    return Shown(method, target.removesuffix(b" HTTP/1.1"), fields)


def begun(passed: Exchange, authority: bytes) -> Begun:
    """The last request that was forwarded."""
    method, target, fields = shown(passed.head[: passed.shown])
    told = [(name, fields[name]) for name in _TOLD if name in fields]
    return Begun(
        RequestHead(method or b"GET", b"http", authority, target or b"/", None, told),
        passed.started_ns * _NS,
        max(passed.bytes_in - passed.unsent, 0),
        passed.egress,
        passed.ingress,
        passed.status if passed.left else 0,
        passed.bytes_out - passed.left if passed.left else 0,
    )
