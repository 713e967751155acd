"""The self-test's checks of the filter at pods' interfaces, for bpf.selftest_probe.

Its programs on the loopback interface of a network namespace of their own, whose address is a pod's
then. Each check says why its fact does not hold, "" if it does, or raises the OSError that it met.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from bpf import syscall
from bpf.attach import open_program, opened
from bpf.enforcement import Enforcement
from bpf.maps import PinnedMap
from bpf.selftest_probe import TIMEOUT_S
from bpf.selftest_redirect import NODE
from bpf.structs import Address, Number
from mesh.model.identity import FIRST_WORKLOAD
from mesh.model.nodeconfig import SvidSection, WorkloadSection
from mesh.model.policyconfig import CidrSection, Direction, PolicyRule, PolicySection, PortRange

_POD = NODE["4"]
_KEY = "policy/self/test"
# Above those that clients get: on this interface, answers are packets from the pod too.
_PORT = 65000
_LOOPBACK_INDEX = 1
_TCX_INGRESS, _TCX_EGRESS = 46, 47


def checks(pin: Path) -> dict[str, Callable[[], str]]:
    """By fact, in order."""
    return {"refusals": lambda: _refusals(pin), "own_stack": lambda: _own_stack(pin)}


def _refusals(pin: Path) -> str:
    ranges = {
        f"cidr/{cidr}": CidrSection(cidr, FIRST_WORKLOAD + place)
        for place, cidr in enumerate(("198.51.0.0/16", f"{_POD}/32", "198.51.100.0/24"))
    }
    with _pod(pin) as enforcement, _attached(pin, "pod_egress", _TCX_INGRESS), _server():
        for why, peer, last in (
            ("a connection that no rule allows", FIRST_WORKLOAD, _PORT),
            ("a connection to another port than a rule's", FIRST_WORKLOAD + 1, _PORT - 1),
        ):
            enforcement.apply({**ranges, _KEY: _only(peer, PortRange("TCP", 1, last))})
            if not _is_refused():
                return f"{why} is let through"
        enforcement.apply({_KEY: _only(FIRST_WORKLOAD + 1, PortRange("TCP", 1, _PORT))})
        return "a connection that a rule allows is refused" if _is_refused() else ""


def _own_stack(pin: Path) -> str:
    who = "spiffe://self.test/ns/self/sa/test"
    strict = WorkloadSection(
        "self", "test", (_POD,), local=True, identity=256, mtls="STRICT", spiffe_id=who
    )
    with _pod(pin) as enforcement, socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind((_POD, 0))
        receiver.settimeout(TIMEOUT_S)
        svid = {f"svid/{who}": SvidSection(who, "", "", 1 << 32)}
        enforcement.apply({"workload/self/test": strict, **svid})
        with _attached(pin, "pod_ingress", _TCX_EGRESS):
            _send("127.0.0.1", receiver)
            receiver.recv(1)
        with _attached(pin, "pod_ingress", _TCX_INGRESS):
            _send("127.0.0.1", receiver)
            _send(_POD, receiver)
            # In the order in which they were sent.
            if receiver.recvfrom(1)[1][0] != _POD:
                return "a packet from elsewhere is taken for one of the node's own"
    return ""


def _send(source: str, receiver: socket.socket) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sender:
        sender.bind((source, 0))
        sender.sendto(b"?", receiver.getsockname())


def _only(peer: int, ports: PortRange) -> PolicySection:
    rule = PolicyRule("self-test", frozenset({peer}), (ports,))
    egress = Direction(default_deny=True, rules=(rule,))
    return PolicySection("self", "test", 256, (_POD,), egress=egress)


@contextlib.contextmanager
def _pod(pin: Path) -> Iterator[Enforcement]:
    """The address is one of a pod behind the loopback interface, with nothing in force yet."""
    interfaces = PinnedMap(pin, "interfaces", Address, Number)
    enforcement = Enforcement(pin, None)
    with contextlib.closing(interfaces), contextlib.closing(enforcement):
        interfaces.put(Address.of(_POD), Number(_LOOPBACK_INDEX))
        try:
            yield enforcement
        finally:
            enforcement.replace({})
            interfaces.remove(Address.of(_POD))


@contextlib.contextmanager
def _attached(pin: Path, name: str, attach_type: int) -> Iterator[None]:
    with (
        opened(open_program(pin, name)) as program,
        opened(syscall.link(program, _LOOPBACK_INDEX, attach_type)),
    ):
        yield


def _server() -> socket.socket:
    return socket.create_server((_POD, _PORT))


def _is_refused() -> bool:
    """To the pod, at once, not after a while. OSError: otherwise."""
    with socket.socket() as client:
        client.settimeout(TIMEOUT_S)
        client.bind((_POD, 0))
        try:
            client.connect((_POD, _PORT))
        except ConnectionRefusedError:
            return True
        return False
