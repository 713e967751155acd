"""The echo service over gRPC: just enough protocol buffers for its few messages.

Messages are those of `gateway_api_conformance.echo_basic.grpcecho`: EchoResponse{assertions = 1},
Assertions{fully_qualified_method = 1, headers = 2, authority = 3, context = 4},
Context{namespace = 1, ingress = 2, service_name = 3, pod = 4}.
"""

from __future__ import annotations

from echo.answer import Pod

SERVICE = "gateway_api_conformance.echo_basic.grpcecho.GrpcEcho"
METHODS = tuple(f"/{SERVICE}/{name}" for name in ("Echo", "EchoTwo", "EchoThree"))

OK, UNKNOWN, INTERNAL, UNIMPLEMENTED, UNAVAILABLE = 0, 2, 13, 12, 14
# A response without grpc-status: what a client makes of the HTTP status (gRPC over HTTP/2).
FROM_HTTP = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def frame(message: bytes) -> bytes:
    """A length-prefixed message, not compressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def response(method: str, authority: str, pod: Pod) -> bytes:
    context = _field(1, pod.namespace.encode()) + _field(4, pod.name.encode())
    assertions = _field(1, method.encode()) + _field(3, authority.encode()) + _field(4, context)
    return frame(_field(1, assertions))


def parse(message: bytes) -> dict[int, bytes]:
    """The last value of every length-delimited field. ValueError: something else is there."""
    fields: dict[int, bytes] = {}
    position = 0

    def number() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        key = number()
        if key & 7 != 2:
            raise ValueError(f"wire type {key & 7}")
        size = number()
        fields[key >> 3] = message[position : position + size]
        position += size
    return fields


def seen_by(body: bytes) -> tuple[str, str, str]:
    """Method, namespace and pod of an echo response's one frame."""
    if len(body) < 5 or body[0] != 0 or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise ValueError(f"not one uncompressed gRPC message: {body[:32]!r}")
    assertions = parse(parse(body[5:])[1])
    context = parse(assertions.get(4, b""))
    return (
        assertions.get(1, b"").decode(),
        context.get(1, b"").decode(),
        context.get(4, b"").decode(),
    )
