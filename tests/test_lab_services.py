"""Services in the lab: pods of every node reach them by ClusterIP, by eBPF at their own node."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest
from bpf_world import needs_bpf
from lab_world import Lab, lab_of, needs_root, until

pytestmark = [needs_root, needs_bpf]

_ECHO = """
import os, socket
server = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    connection, client = server.accept()
    connection.sendall(f"{os.environ['POD_NAME']} {client[0]}".encode())
    connection.close()
"""
# As many connections as asked for: who answered, and whom the socket says it is connected to.
_ASK = """
import json, socket, sys
host, count = sys.argv[1], int(sys.argv[2])
seen = []
for _ in range(count):
    try:
        with socket.create_connection((host, 80), timeout=5) as connection:
            peer = connection.getpeername()[0]
            seen.append([*connection.recv(100).decode().split(), peer])
    except OSError as error:
        seen.append([type(error).__name__, "", ""])
print(json.dumps(seen))
"""
CONFIG = f"""
nodes: [{{name: a}}, {{name: b}}]
pods:
  - name: echo
    replicas: 2
    command: [python3, -c, {json.dumps(_ECHO)}]
    ports: [{{name: http, port: 8080}}]
  - {{name: idle, node: a}}
  - {{name: far, node: b}}
services:
  - {{name: echo, ports: [{{port: 80, targetPort: http}}]}}
"""
VIPS = ("10.96.0.10", "fd00:10:96::a")
CLIENTS = {"idle": ("10.244.0.3", "fd00:10:244::3"), "far": ("10.244.1.3", "fd00:10:244:1::3")}
# To pods of other nodes bytes go through the proxies of both: the far one is seen there.
NODES = {"idle": ("172.18.0.3", "fd00:172:18::3"), "far": ("172.18.0.2", "fd00:172:18::2")}
LOCAL = {"idle": "echo-1", "far": "echo-2"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab_of(tmp_path_factory.mktemp("lab"), "s", CONFIG) as lab:
        done = lab.up()
        assert done.returncode == 0, done.stderr
        yield lab


def asked(lab: Lab, pod: str, host: str, count: int) -> list[list[str]]:
    answers: list[list[str]] = json.loads(lab.python(pod, _ASK, host, str(count)))
    return answers


@pytest.mark.parametrize("family", [0, 1])
@pytest.mark.parametrize("pod", ["idle", "far"])
def test_pods_of_every_node_are_balanced_over_all_endpoints(
    lab: Lab, pod: str, family: int
) -> None:
    answers = asked(lab, pod, VIPS[family], 60)
    prefix = ("::ffff:", "")[family]
    for name, client, peer in answers:
        seen = CLIENTS if name == LOCAL[pod] else NODES
        assert client == prefix + seen[pod][family]
        # The client sees the address that it asked for.
        assert peer == VIPS[family]
    counts = Counter(name for name, _, _ in answers)
    assert counts.keys() == {"echo-1", "echo-2"}
    # Each at 1/2: fewer than 8 of 60 once in far more than 10**9 runs.
    assert min(counts.values()) >= 8


def test_name_of_a_service_leads_there(lab: Lab) -> None:
    assert {name for name, _, _ in asked(lab, "idle", "echo", 30)} == {"echo-1", "echo-2"}


def test_stopped_pods_get_nothing_new_and_none_is_refused_at_once(lab: Lab) -> None:
    def names(pod: str) -> set[str]:
        return {name for name, _, _ in asked(lab, pod, "echo", 20)}

    assert lab.weft("stop", "echo-1").returncode == 0
    for pod in ("idle", "far"):
        until(lambda pod=pod: names(pod) == {"echo-2"})
    assert lab.weft("stop", "echo-2").returncode == 0
    for pod in ("idle", "far"):
        until(lambda pod=pod: names(pod) == {"ConnectionRefusedError"})
    for pod in ("echo-1", "echo-2"):
        assert lab.weft("start", pod).returncode == 0
    until(lambda: names("far") == {"echo-1", "echo-2"})
