"""A stub worker that tells of the flows that a test wants told: whoever connects to its port sends
Flows in msgpack, closes its side, and reads "told" when they have been written to the agent.

"no agent": there is none now. WEFT_STUB_… as in stub_worker.
"""

import argparse
import socket
import sys

import msgspec

from mesh.model.channel import encode_frame
from mesh.model.flow import Flows
from tests.support.stub_worker import StubWorker


class FlowWorker(StubWorker):
    def on_connection(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(True)
        with connection:
            data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            if self.channel is None:
                connection.sendall(b"no agent")
                return
            flows = msgspec.msgpack.decode(data, type=Flows)
            try:
                self.channel.sendall(encode_frame(flows))
            except BrokenPipeError:
                connection.sendall(b"no agent")
            else:
                connection.sendall(b"told")


def tell(port, *flows, lost=0):
    """Have a worker tell its agent; False: there is no agent."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(msgspec.msgpack.encode(Flows(flows, lost)))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(64), b""))
    assert answer in (b"told", b"no agent")
    return answer == b"told"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int)
    args, _ = parser.parse_known_args()
    FlowWorker(socket.socket(fileno=args.control_fd)).run()
    sys.exit(0)
