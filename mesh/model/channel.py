"""Messages between supervisor, agent and workers, and their framing.

Control sockets (supervisor to each child) are SOCK_SEQPACKET: one message a packet, file
descriptors beside it. Config channels (agent to each worker, handed out by the supervisor as a
socket pair) are streams of frames: 4 bytes of length, big endian, then msgpack. This module knows
shapes and bytes, no sockets' life.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from mesh.model.flow import Flows
from mesh.model.nodeconfig import Ack, Delta

MAX_FRAME = 256 * 1024 * 1024
MAX_PACKET = 1024 * 1024
_MAX_FDS = 64


class PortAddress(msgspec.Struct, frozen=True, array_like=True):
    """An address to bind ("::" and "0.0.0.0" are wildcards) and a TCP port."""

    address: str
    port: int


class Want(msgspec.Struct, frozen=True, tag="want"):
    """Agent to supervisor: these and no other ports shall be bound."""

    ports: tuple[PortAddress, ...]


class Bound(msgspec.Struct, frozen=True, tag="bound"):
    """Supervisor to agent, the answer to every Want: ports that are bound, and why others are not.
    Sent again when that changes."""

    bound: tuple[PortAddress, ...]
    failed: tuple[tuple[PortAddress, str], ...] = ()


class Worker(msgspec.Struct, frozen=True, tag="worker"):
    """Supervisor to agent, with the agent's end of a config channel: worker `id` is there. When it
    goes, the channel ends."""

    id: int
    pid: int


class Channel(msgspec.Struct, frozen=True, tag="channel"):
    """Supervisor to worker, with the worker's end of a config channel; replaces the one before."""


class Listen(msgspec.Struct, frozen=True, tag="listen"):
    """Supervisor to worker, with a listening socket: accept on it while the configuration has this
    port and until Unlisten."""

    port: PortAddress


class Unlisten(msgspec.Struct, frozen=True, tag="unlisten"):
    port: PortAddress


class Handles(msgspec.Struct, frozen=True, tag="handles"):
    """Agent to supervisor, and supervisor to every worker: descriptors of what the eBPF data path
    has for proxies, in the order of `names` (bpf.proxy.descriptors). The supervisor keeps them for
    workers to come; a later message replaces them. The answer, without descriptors: all workers
    have them; the worker has them."""

    names: tuple[str, ...]


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Supervisor to worker: accept nothing new, finish what there is, exit by `deadline_s`."""

    deadline_s: float


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """Supervisor to agent: this node is about to serve no more, tell who sends it anything. The
    answer: they have been told, or there is nobody to tell."""


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    """Worker to agent, and agent to the node's other workers: the two ends of tunnels have proved
    to the first who they are once more (l7proxy.tunnels). `source` ("<ns>/<name>" of a pod, or of a
    Gateway, which says for whom: `told`) is `source_id`, with this certificate chain (leaf first,
    DER), through the proxy at `node` (an address); `destination_id` is what it has tunnels to
    here."""

    source: str
    gateway: bool
    source_id: str
    destination_id: str
    node: str
    chain: tuple[bytes, ...]
    told: str = ""


Frame: TypeAlias = Delta | Ack | Flows | Proof
Control: TypeAlias = Want | Bound | Worker | Channel | Listen | Unlisten | Handles | Drain | Leaving

_encoder = msgspec.msgpack.Encoder()
_control = msgspec.msgpack.Decoder(Control)
_frame = msgspec.msgpack.Decoder(Frame)


def encode_frame(message: Frame) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


class FrameReader:
    """Cuts a config channel's bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> Iterator[Frame]:
        """Take bytes; yield the messages that are complete. ValueError: not this protocol."""
        self._buffer += data
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > MAX_FRAME:
                raise ValueError(f"config channel: a frame of {size} bytes")
            if len(self._buffer) < 4 + size:
                return
            body = bytes(memoryview(self._buffer)[4 : 4 + size])
            del self._buffer[: 4 + size]
            yield _frame.decode(body)


def send_control(sock: socket.socket, message: Control, fds: tuple[int, ...] = ()) -> None:
    """Send one message with its descriptors. The socket's own errors come through."""
    packet = _encoder.encode(message)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([packet], rights)


def receive_control(sock: socket.socket) -> tuple[Control, list[int]] | None:
    """Receive one message and the descriptors that came with it (the caller owns them); None when
    the other side is gone. BlockingIOError as usual on a non-blocking socket."""
    try:
        packet, fds, _flags, _address = socket.recv_fds(sock, MAX_PACKET, _MAX_FDS)
    except ConnectionResetError:
        return None
    if not packet:
        return None
    return _control.decode(packet), list(fds)
