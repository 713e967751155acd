"""A worker that speaks the control socket and the config channel and answers every connection with
one line: its pid and the configuration it has. Stands in for l7proxy.worker where the supervisor
or the agent is under test.

WEFT_STUB_MUTE=1: does not acknowledge. WEFT_STUB_REFUSE=<prefix>: refuses such sections.
"""

import argparse
import os
import select
import socket
import sys

from mesh.model.channel import (
    Channel,
    Drain,
    FrameReader,
    Handles,
    Listen,
    Unlisten,
    encode_frame,
    receive_control,
    send_control,
)
from mesh.model.nodeconfig import Ack, Delta


class StubWorker:
    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.channel: socket.socket | None = None
        self.reader = FrameReader()
        self.listeners: dict[object, socket.socket] = {}
        self.sections: dict[str, object] = {}
        self.version = 0

    def run(self) -> None:
        while True:
            waiting = [self.control, *self.listeners.values()]
            if self.channel is not None:
                waiting.append(self.channel)
            ready, _, _ = select.select(waiting, [], [])
            for sock in ready:
                if sock is self.control:
                    if not self.on_control():
                        return
                elif sock is self.channel:
                    self.on_channel()
                else:
                    self.on_connection(sock)

    def on_control(self) -> bool:
        received = receive_control(self.control)
        if received is None:
            return False
        message, fds = received
        match message:
            case Channel():
                self.channel, self.reader = socket.socket(fileno=fds[0]), FrameReader()
            case Listen(port):
                self.listeners[port] = socket.socket(fileno=fds[0])
            case Unlisten(port):
                self.listeners.pop(port).close()
            case Handles():
                send_control(self.control, message)
            case Drain():
                return False
        return True

    def on_channel(self) -> None:
        assert self.channel is not None
        data = self.channel.recv(1 << 20)
        if not data:
            self.channel.close()
            self.channel = None
            return
        for message in self.reader.receive(data):
            assert isinstance(message, Delta)
            if message.base is None:
                self.sections.clear()
            self.sections.update(message.put)
            for key in message.remove:
                self.sections.pop(key, None)
            self.version = message.version
            if os.environ.get("WEFT_STUB_MUTE"):
                continue
            prefix = os.environ.get("WEFT_STUB_REFUSE")
            refused = {
                key: "the stub refuses it"
                for key in self.sections
                if prefix and key.startswith(prefix)
            }
            self.channel.sendall(encode_frame(Ack(message.version, refused)))

    def on_connection(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # another worker was faster
            return
        routes = sorted(key for key in self.sections if key.startswith("route/"))
        with connection:
            connection.sendall(f"{os.getpid()} {' '.join(routes)}\n".encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int)
    args, _ = parser.parse_known_args()
    StubWorker(socket.socket(fileno=args.control_fd)).run()
    sys.exit(0)
