"""A process of a pod that tries to reach another one past its policy, or to ask too much.

    attack.py OWN4 VICTIM4 VICTIM6 FRIEND4 NODE4

Prints a JSON object: what became of each attempt, "answered" where the victim did. FRIEND is a pod
that the victim's policy lets in, NODE the victim's. All of it says "evil".
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import struct
import sys
from collections.abc import Iterator

OWN, VICTIM, VICTIM6, FRIEND, NODE = sys.argv[1:]
MAPPED = f"::ffff:{VICTIM}"
PORTS = (80, 8080, 9090)
_ANSWER_S = 1.0


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def by_tcp(address: str, port: int, data: bytes, own: str = "") -> str:
    with socket.socket(family_of(address), socket.SOCK_STREAM) as sock:
        sock.settimeout(_ANSWER_S)
        try:
            if own:
                sock.bind((own, 0))
            sock.connect((address, port))
            sock.sendall(data)
            answer = sock.recv(1000)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "silent")
    if answer.startswith(b"HTTP/1.1 "):
        return answer.split()[1].decode()
    return "answered" if b"evil" in answer else "closed"


def by_udp(address: str, own: str = "") -> str:
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as sock:
        try:
            if own:
                sock.bind((own, 0))
            sock.sendto(b"evil", (address, 53))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "error")
    return "sent"


def datagram(source: str, *, ttl: int = 64, data: bytes = b"evil") -> bytes:
    """To the victim, whoever it is from."""
    udp = struct.pack("!HHHH", 4000, 53, 8 + len(data), 0) + data
    ends = socket.inet_aton(source) + socket.inet_aton(VICTIM)
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, ttl, 17, 0) + ends + udp


def fragments(source: str) -> Iterator[bytes]:
    """The same in two, the later one first, with another port where that may be taken for one."""
    whole = datagram(source, data=b"evil" * 8)
    head, rest = bytearray(whole[:20]), whole[20:]
    for offset in (16, 0):
        part = rest[offset:] if offset else rest[:16]
        more = 0 if offset else 1 << 13
        struct.pack_into("!HHH", head, 2, 20 + len(part), 77, more | offset >> 3)
        yield bytes(head) + part


def raw(packet: bytes) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        try:
            sock.sendto(packet, (VICTIM, 0))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "error")
    return "sent"


def request(path: str, host: str = "victim") -> bytes:
    return f"GET {path}?evil HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def main() -> None:
    found: dict[str, str] = {}
    for address in (VICTIM, VICTIM6, MAPPED):
        for port in PORTS:
            found[f"tcp {address} {port}"] = by_tcp(address, port, b"evil\r\n\r\n")
        found[f"udp {address}"] = by_udp(address)
        for path in ("/public", "/admin"):
            found[f"http {address} {path}"] = by_tcp(address, 8080, request(path))
    # Loopback: its own, and as if it were the victim's.
    for own in ("127.0.0.1", "::1"):
        target = VICTIM6 if ":" in own else VICTIM
        found[f"tcp as {own}"] = by_tcp(target, 9090, b"evil", own)
        found[f"udp as {own}"] = by_udp(target, own)
    # In the name of others, and at the end of life; in pieces.
    for source in (FRIEND, NODE, "127.0.0.1", VICTIM):
        found[f"raw as {source}"] = raw(datagram(source))
    found["raw"] = raw(datagram(OWN))
    found["ttl 1"] = raw(datagram(OWN, ttl=1))
    for number, packet in enumerate(fragments(OWN)):
        found[f"fragment {number}"] = raw(packet)
    # The proxy's own ports, as if it had been steered there.
    for port in (15001, 15002, 15008):
        outcome = by_tcp(NODE, port, request("/public", f"{VICTIM}:8080"))
        found[f"proxy {port}"] = outcome
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
