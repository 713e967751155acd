"""What the proxies of two nodes say to each other before a tunnel carries bytes: a preface, an
answer.

Each is a frame: b"WEFT", the version (one byte), the length of what follows (two bytes, big-endian)
and a msgpack map. The head stays as it is in every version, so that one can be refused in words.
ALPN carries the version too. Knows bytes only; what they mean is judged elsewhere.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec

from l7proxy.tls_stream import TLSStream

VERSION = 1
_MAGIC = b"WEFT"
_HEAD = struct.Struct(">4sBH")
_MAX_BYTES = 2048
_MAX_WORDS = 400

Kind: TypeAlias = Literal["http", "tcp", "proof"]


class Preface(msgspec.Struct, frozen=True, omit_defaults=True):
    """`source`: "<ns>/<name>" of the pod, or the Gateway, on whose behalf the sender connects;
    `told`: who asks the Gateway, to policies: a pod's address or a range that one of them names
    ("": neither); `address` and `port`: the endpoint to connect to. `kind` "http": requests that
    the sender has read, in clear; "proof": nothing is connected to, for tunnels between the two
    that are open already (see `tunnels`). `port_of_source`: of the pod's own connection, for flow
    records; 0: there are several, or none. `turns`: the sender knows turns (see `turn`)."""

    source: str
    address: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    kind: Kind = "tcp"
    gateway: bool = False
    port_of_source: int = 0
    told: str = ""
    turns: bool = False


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`reason` "": bytes may follow. Else the connection ends; snake case, counted; `why` is for
    people. `turns`: what follows is a turn. Who knows nothing of turns neither asks nor says so."""

    reason: str = ""
    why: str = ""
    turns: bool = False


class WireError(Exception):
    """The peer does not speak this version, or not this protocol. `reason` is counted."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


Message = TypeVar("Message", Preface, Answer)


def encode(message: Preface | Answer) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _HEAD.pack(_MAGIC, VERSION, len(body)) + body


def refusal(reason: str, why: str) -> bytes:
    return encode(Answer(reason, why[:_MAX_WORDS]))


async def receive(stream: TLSStream, kind: type[Message]) -> Message:
    """WireError; ssl.SSLError or ConnectionError: the peer is gone."""
    magic, version, size = _HEAD.unpack(await stream.read_exactly(_HEAD.size))
    if magic != _MAGIC:
        raise WireError("preface", "the peer does not speak Weft's tunnel protocol")
    if version != VERSION:
        raise WireError(
            "version",
            f"tunnel version {version} is not spoken here, but {VERSION}: the two nodes run "
            "versions of Weft that do not work together",
        )
    if size > _MAX_BYTES:
        raise WireError("preface", f"{size} bytes before the first are more than {_MAX_BYTES}")
    try:
        return msgspec.msgpack.decode(await stream.read_exactly(size), type=kind)
    except msgspec.MsgspecError as error:
        raise WireError("preface", f"the peer's first words have no sense: {error}") from None
