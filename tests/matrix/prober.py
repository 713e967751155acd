"""A process of a pod, a node or a client outside: answers whoever asks, and asks others when told.

    prober.py CONTROL NAME ADDRESS...

At each address it echoes what comes by TCP and UDP at the ports below (HTTP is answered 200), and
keeps what has come, by ICMP too; the kernel answers pings. Through the unix socket CONTROL it takes
one JSON order a line:

    {"round": N, "wait": S, "probes": [[number, protocol, own address, address, port, hope], ...]}
        asks all at once: {"outcomes": {number: "answered", "silent" or an errno's name}, "seen": …}
    {"stream": [[number, protocol, own address, address, port], ...], "every": S}
        sends datagrams and lines until {"stop": 1}
    {"seen": 1} what has come since it was last asked for: [[text, time], ...]

A probe that there is hope for is waited for long; of the others it is enough that they have not
come in `wait` seconds, for what comes later is in `seen`. The text of a probe is
"round:name>number", of a datagram of a stream "~name>number@time sent"; times are those of
CLOCK_MONOTONIC, which all pods share.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

TCP_PORTS, UDP_PORTS = (80, 8080, 9090), (53, 80)
# Only what is lost, or hangs, is waited for so long.
HOPE_S = 10.0
AGAIN_S = 0.1
_ECHO = {4: (8, 0), 6: (128, 129)}
_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Handler = Callable[[], None]


def version_of(address: str) -> int:
    return 6 if ":" in address else 4


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "error")


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Prober:
    def __init__(self, control: str, name: str, addresses: list[str]) -> None:
        self.name = name
        self.selector = selectors.DefaultSelector()
        self.seen: list[tuple[str, float]] = []
        self.round: Round | None = None
        self.stream: Stream | None = None
        self.pings = {address: Ping(self, address) for address in addresses}
        for address in addresses:
            for port in TCP_PORTS:
                server = socket.socket(family_of(address), socket.SOCK_STREAM)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind((address, port))
                server.listen(1024)
                self.watch(server, lambda server=server: self.accept(server))
            for port in UDP_PORTS:
                udp = socket.socket(family_of(address), socket.SOCK_DGRAM)
                udp.bind((address, port))
                self.watch(udp, lambda udp=udp: self.echo(udp))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(control)
        listener.listen()
        self.watch(listener, lambda: self.take_control(listener.accept()[0]))

    def watch(
        self, sock: socket.socket, handler: Handler, events: int = selectors.EVENT_READ
    ) -> None:
        sock.setblocking(False)
        self.selector.register(sock, events, handler)

    def drop(self, sock: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self.selector.unregister(sock)
        sock.close()

    def note(self, data: bytes) -> None:
        self.seen.append((data.decode(errors="replace"), time.monotonic()))

    # --- answering ------------------------------------------------------------------------------

    def accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = server.accept()[0]
                self.watch(client, functools.partial(self.echo_stream, client, bytearray()))

    def echo_stream(self, client: socket.socket, begun: bytearray) -> None:
        """`begun`: the line of a stream that has not come whole yet."""
        try:
            data = client.recv(65536)
            if data and (begun or data.startswith(b"~")):
                *lines, rest = (bytes(begun) + data).split(b"\n")
                for line in lines:
                    self.note(line)
                begun[:] = rest
                return
            if data:
                self.note(data)
                client.send(_OK if b" HTTP/1.1\r\n" in data else data)
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.drop(client)

    def echo(self, udp: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, source = udp.recvfrom(4096)
                self.note(data)
                if not data.startswith(b"~"):
                    udp.sendto(data, source)

    # --- orders ---------------------------------------------------------------------------------

    def take_control(self, control: socket.socket) -> None:
        lines = control.makefile("rb")
        self.selector.register(control, selectors.EVENT_READ, lambda: self.order(control, lines))

    def order(self, control: socket.socket, lines: Any) -> None:
        line = lines.readline()
        if not line:
            self.drop(control)
            return
        order = json.loads(line)
        if "round" in order:
            self.round = Round(self, order, lambda answer: self.say(control, answer))
        elif "stream" in order:
            self.stream = Stream(self, order)
            self.say(control, {})
        elif "stop" in order:
            sent = self.stream.end() if self.stream else {}
            self.stream = None
            self.say(control, {"sent": sent})
        else:
            self.say(control, {"seen": self.take_seen()})

    def take_seen(self) -> list[tuple[str, float]]:
        seen, self.seen = self.seen, []
        return seen

    def say(self, control: socket.socket, answer: dict[str, Any]) -> None:
        control.sendall(json.dumps(answer).encode() + b"\n")

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select(self.pause()):
                key.data()
            if self.stream is not None:
                self.stream.send()
            if self.round is not None and self.round.tick():
                self.round = None

    def pause(self) -> float | None:
        if self.stream is not None:
            return 0 if self.round else self.stream.pause()
        return 0.01 if self.round is not None else None


class Ping:
    """Echo requests and their answers at one address."""

    def __init__(self, prober: Prober, address: str) -> None:
        self.version = version_of(address)
        protocol = socket.IPPROTO_ICMPV6 if self.version == 6 else socket.IPPROTO_ICMP
        self.socket = socket.socket(family_of(address), socket.SOCK_RAW, protocol)
        self.socket.bind((address, 0))
        self.prober = prober
        prober.watch(self.socket, self.receive)

    def receive(self) -> None:
        ask, answer = _ECHO[self.version]
        with contextlib.suppress(OSError):
            while True:
                data = self.socket.recv(4096)[20 if self.version == 4 else 0 :]
                if data[0] == ask:
                    self.prober.note(data[8:])
                elif data[0] == answer and self.prober.round is not None:
                    self.prober.round.answered(data[8:])

    def send(self, data: bytes, address: str, number: int) -> None:
        kind = _ECHO[self.version][0]
        head = struct.pack("!BBHHH", kind, 0, 0, os.getpid() & 0xFFFF, number & 0xFFFF)
        if self.version == 4:
            head = head[:2] + struct.pack("!H", checksum(head + data)) + head[4:]
        self.socket.sendto(head + data, (address, 0))


class Round:
    """Probes, all at once."""

    def __init__(self, prober: Prober, order: Any, done: Callable[[dict[str, Any]], None]) -> None:
        self.prober = prober
        self.done = done
        self.number = order["round"]
        self.outcomes: dict[int, str] = {}
        self.started = time.monotonic()
        self.wait = order["wait"]
        self.again = self.started + AGAIN_S
        self.datagrams: dict[int, tuple[str, str, str, int]] = {}
        self.sockets: dict[str, socket.socket] = {}
        self.open: dict[int, socket.socket] = {}
        self.hopes = {probe[0] for probe in order["probes"] if probe[5]}
        for number, protocol, own, address, port, _ in order["probes"]:
            if protocol == "TCP":
                self.connect(number, own, address, port)
            else:
                self.datagrams[number] = (protocol, own, address, port)
        self.send()

    def text(self, number: int) -> bytes:
        return f"{self.number}:{self.prober.name}>{number}".encode()

    def answered(self, data: bytes) -> None:
        prefix = f"{self.number}:{self.prober.name}>".encode()
        if data.startswith(prefix):
            self.outcomes[int(data.removeprefix(prefix))] = "answered"

    def connect(self, number: int, own: str, address: str, port: int) -> None:
        sock = socket.socket(family_of(address), socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.bind((own, 0))
            sock.connect((address, port))
        except BlockingIOError:
            pass
        except OSError as error:
            self.outcomes[number] = name_of(error)
            sock.close()
            return
        self.open[number] = sock
        self.prober.watch(sock, lambda: self.connected(number, sock), selectors.EVENT_WRITE)

    def connected(self, number: int, sock: socket.socket) -> None:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            if error:
                raise OSError(error, "")
            sock.send(self.text(number))
        except OSError as failed:
            self.end(number, name_of(failed))
            return
        read = selectors.EVENT_READ
        self.prober.selector.modify(sock, read, lambda: self.read(number, sock))

    def read(self, number: int, sock: socket.socket) -> None:
        try:
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(number, name_of(error))
            return
        self.end(number, "answered" if data == self.text(number) else "closed")

    def end(self, number: int, outcome: str) -> None:
        self.outcomes[number] = outcome
        self.prober.drop(self.open.pop(number))

    def send(self) -> None:
        """Again what was not answered, for datagrams may be lost."""
        for number, (protocol, own, address, port) in self.datagrams.items():
            if number in self.outcomes:
                continue
            try:
                if protocol == "UDP":
                    self.udp(own).sendto(self.text(number), (address, port))
                else:
                    self.prober.pings[own].send(self.text(number), address, number)
            except OSError as error:
                self.outcomes[number] = name_of(error)

    def udp(self, own: str) -> socket.socket:
        if own not in self.sockets:
            sock = socket.socket(family_of(own), socket.SOCK_DGRAM)
            sock.bind((own, 0))
            self.sockets[own] = sock
            self.prober.watch(sock, lambda: self.receive(sock))
        return self.sockets[own]

    def receive(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self.answered(sock.recv(4096))
                except BlockingIOError:
                    raise
                except OSError:  # an error that ICMP told of, about one of them
                    continue

    def tick(self) -> bool:
        """Whether it is over."""
        now = time.monotonic()
        late = now > self.started + HOPE_S
        waiting = self.open or self.hopes - self.outcomes.keys() or now < self.started + self.wait
        if waiting and not late:
            if now > self.again:
                self.again = now + AGAIN_S
                self.send()
            return False
        for number in tuple(self.open):
            self.end(number, "silent")
        for number in self.datagrams:
            self.outcomes.setdefault(number, "silent")
        for sock in self.sockets.values():
            self.prober.drop(sock)
        self.done({"outcomes": self.outcomes, "seen": self.prober.take_seen()})
        return True


class Stream:
    """Datagrams and lines of connections, one to each target in turn. Now and then from new
    sockets, and from a new one where a connection was refused or has ended."""

    def __init__(self, prober: Prober, order: Any) -> None:
        self.prober = prober
        self.every = order["every"]
        self.targets = order["stream"]
        self.next = time.monotonic()
        self.turn = 0
        self.sent = dict.fromkeys((target[0] for target in self.targets), 0)
        self.datagrams: dict[str, socket.socket] = {}
        self.connections: dict[int, socket.socket] = {}

    def pause(self) -> float:
        return max(0.0, self.next - time.monotonic())

    def send(self) -> None:
        if time.monotonic() < self.next:
            return
        self.turn += 1
        if self.turn % 10 == 0:
            self.close()
        for number, protocol, own, address, port in self.targets:
            try:
                if protocol == "UDP":
                    if own not in self.datagrams:
                        self.datagrams[own] = socket.socket(family_of(own), socket.SOCK_DGRAM)
                        self.datagrams[own].bind((own, 0))
                    self.datagrams[own].sendto(self.text(number), (address, port))
                elif number in self.connections:
                    self.connections[number].send(self.text(number) + b"\n")
                else:
                    self.connect(number, address, port)
                    continue
                self.sent[number] += 1
            except BlockingIOError:
                pass  # it is being connected
            except OSError:
                if protocol == "TCP":
                    self.connections.pop(number).close()
        self.next = max(self.next + self.every, time.monotonic())

    def connect(self, number: int, address: str, port: int) -> None:
        sock = self.connections[number] = socket.socket(family_of(address), socket.SOCK_STREAM)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((address, port))

    def text(self, number: int) -> bytes:
        return f"~{self.prober.name}>{number}@{time.monotonic()}".encode()

    def close(self) -> None:
        for sockets in (self.datagrams, self.connections):
            for sock in sockets.values():
                sock.close()
            sockets.clear()

    def end(self) -> dict[int, int]:
        self.close()
        return self.sent


if __name__ == "__main__":
    Prober(sys.argv[1], sys.argv[2], sys.argv[3:] or os.environ["POD_IPS"].split(",")).run()
