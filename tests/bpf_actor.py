"""A process in a cgroup and a network namespace that does with sockets what it is told.

Run as a program: bpf_actor.py CGROUP [NETNS]; without NETNS that is one of its own. Each line in is
JSON, [function, arguments...]; each line out is its result, or {"errno": NAME}. It imports nothing
of the project.
"""

from __future__ import annotations

import collections
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import threading
from pathlib import Path

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
TIMEOUT_S = 5
kept: dict[int, socket.socket] = {}


def enter(cgroup: str, netns: str = "") -> None:
    (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    if netns:
        with open(netns) as there:
            if libc.setns(there.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        return
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack_from("h", request, 16)[0] | IFF_UP
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags))


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def peer(address: tuple) -> list:
    return [address[0], address[1]]


def serve_tcp(address: str, name: str) -> int:
    """Greets each connection with its name and a line end, then echoes; the port."""
    server = socket.create_server((address, 0), family=family_of(address), backlog=512)

    def serve_one(connection: socket.socket) -> None:
        with connection:
            connection.sendall(name.encode() + b"\n")
            while data := connection.recv(4096):
                connection.sendall(data)

    def run() -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    return server.getsockname()[1]


def serve_udp(address: str, name: str) -> int:
    server = socket.socket(family_of(address), socket.SOCK_DGRAM)
    server.bind((address, 0))

    def run() -> None:
        while True:
            _, sender = server.recvfrom(4096)
            server.sendto(name.encode(), sender)

    threading.Thread(target=run, daemon=True).start()
    return server.getsockname()[1]


def opened(address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    made = socket.socket(family_of(address), kind)
    made.settimeout(TIMEOUT_S)
    try:
        made.connect((address, port))
    except OSError:
        made.close()
        raise
    return made


def greeting(connection: socket.socket) -> str:
    with connection.makefile() as lines:
        return lines.readline().strip()


def connect(address: str, port: int, keep: bool = False) -> dict:
    """Which backend answered, and who the socket says it is connected to."""
    connection = opened(address, port)
    result = {"name": greeting(connection), "peer": peer(connection.getpeername())}
    if keep:
        kept[connection.fileno()] = connection
        return result | {"id": connection.fileno()}
    connection.close()
    return result


def http(address: str, port: int) -> dict:
    """The status and the body that a request is answered with."""
    with opened(address, port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = answer.decode().partition("\r\n\r\n")
    return {"status": int(head.split()[1]), "body": body}


def serve_http(address: str, name: str) -> int:
    """Answers each request with its name; the port."""
    server = socket.create_server((address, 0), family=family_of(address))
    length = f"Content-Length: {len(name)}"

    def serve_one(connection: socket.socket) -> None:
        with connection:
            while connection.recv(4096):
                connection.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n{name}".encode())

    def run() -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    return server.getsockname()[1]


def echo(number: int, text: str) -> list:
    """What a kept connection sends back, and who it is connected to."""
    kept[number].sendall(text.encode())
    return [kept[number].recv(4096).decode(), peer(kept[number].getpeername())]


def close(number: int) -> None:
    kept.pop(number).close()


def connect_often(address: str, port: int, times: int) -> dict:
    """How often which backend answered, or the connection failed with which errno."""
    names: collections.Counter[str] = collections.Counter()
    for _ in range(times):
        try:
            with opened(address, port) as connection:
                names[greeting(connection)] += 1
        except OSError as error:
            names[errno.errorcode.get(error.errno or 0, repr(error))] += 1
    return dict(names)


def udp(address: str, port: int, times: int) -> list:
    """What one unconnected socket is answered, and from where."""
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT_S)
        answers = []
        for _ in range(times):
            client.sendto(b"?", (address, port))
            data, sender = client.recvfrom(4096)
            answers.append([data.decode(), *peer(sender)])
        return answers


def udp_ask(addresses: list, number: int = 0) -> int:
    """From one unconnected socket, kept or new; its number."""
    client = kept.get(number) or socket.socket(family_of(addresses[0][0]), socket.SOCK_DGRAM)
    client.settimeout(TIMEOUT_S)
    kept[client.fileno()] = client
    for address, port in addresses:
        client.sendto(b"?", (address, port))
    return client.fileno()


def udp_hear(number: int, times: int) -> list:
    """What it is answered, and from where."""
    answers = []
    for _ in range(times):
        data, sender = kept[number].recvfrom(4096)
        answers.append([data.decode(), *peer(sender)])
    return answers


def udp_connected(address: str, port: int) -> list:
    """What a connected socket is answered, from where, and who it says it is connected to."""
    with opened(address, port, socket.SOCK_DGRAM) as client:
        client.send(b"?")
        data, sender = client.recvfrom(4096)
        return [data.decode(), peer(sender), peer(client.getpeername())]


def udp_connected_anew(address: str, port: int, then: str, then_port: int) -> list:
    """Who a socket says it is connected to, at first and when it is connected elsewhere."""
    with opened(address, port, socket.SOCK_DGRAM) as client:
        first = peer(client.getpeername())
        client.connect((then, then_port))
        return [first, peer(client.getpeername())]


def main() -> None:
    enter(*sys.argv[1:])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            result = globals()[name](*arguments)
        except OSError as error:
            result = {"errno": errno.errorcode.get(error.errno or 0, repr(error))}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
