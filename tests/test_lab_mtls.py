"""Mutual TLS between the nodes of a lab: what is on the wire, and who is let in without it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from bpf_world import needs_bpf
from lab_world import LIMIT_S, Lab, lab_of, needs_root, until
from torture.kills import kill, until_served

from mesh.lab.state import LabDir

pytestmark = [needs_root, needs_bpf]

MARKER = "in-plain-sight"
WEB, ECHO, STRICT = "10.244.1.2", "10.244.1.3", "10.244.1.4"
ALONE, ALONE6, ASKED = "10.244.1.5", "fd00:10:244:1::5", "10.244.1.6"
# HTTP: the path is the answer. TCP: an echo.
_WEB = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", str(len(self.path)))
        self.end_headers()
        self.wfile.write(self.path.encode())
http.server.ThreadingHTTPServer.address_family = 10
http.server.ThreadingHTTPServer(("::", 8080), Handler).serve_forever()
"""
_ECHO = """
import socket, threading
def serve(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()
server = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],)).start()
"""
# What came back of a TCP connection, and whether it ended in order.
_SAY = """
import socket, sys
host, port, text = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
try:
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        back = b""
        while data := connection.recv(65536):
            back += data
    print("same" if back == text else "other", len(back))
except OSError as error:
    print(type(error).__name__)
"""
# A connection in use, until its input says that something has happened: how it has ended.
_HOLD = """
import socket, sys
with socket.create_connection((sys.argv[1], 9000), timeout=60) as connection:
    connection.sendall(b"half of it")
    print(len(connection.recv(10, socket.MSG_WAITALL)), flush=True)
    sys.stdin.readline()
    try:
        print("ended" if not connection.recv(1) else "bytes")
    except OSError as error:
        print(type(error).__name__)
"""
# All packets on an interface, from when it says so until its input ends; as hexadecimal.
_CAPTURE = """
import select, socket, sys
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
link.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
link.bind((sys.argv[1], 0))
print("ready", flush=True)
ending = False
while True:
    ready, _, _ = select.select([link] if ending else [link, 0], [], [], 0 if ending else None)
    if link in ready:
        print(link.recv(65536).hex())
    elif ending:
        break
    elif 0 in ready:
        ending = True
"""
CONFIG = f"""
nodes: [{{name: a}}, {{name: b}}]
pods:
  - name: web
    node: b
    serviceAccount: web
    command: [python3, -c, {json.dumps(_WEB)}]
    ports: [{{name: http, port: 8080}}]
  - name: echo
    node: b
    serviceAccount: echo
    command: [python3, -c, {json.dumps(_ECHO)}]
    ports: [{{name: tcp-echo, port: 9000}}]
  - name: strict
    node: b
    serviceAccount: echo
    annotations: {{weft.dev/mtls: STRICT}}
    command: [python3, -c, {json.dumps(_ECHO)}]
    ports: [{{name: tcp-echo, port: 9000}}]
  # No Service leads to it.
  - {{name: alone, node: b, command: [python3, -c, {json.dumps(_ECHO)}]}}
  # A policy asks for what it does not want itself.
  - name: asked
    node: b
    annotations: {{weft.dev/mtls: DISABLE}}
    command: [python3, -c, {json.dumps(_ECHO)}]
    ports: [{{name: tcp-echo, port: 9000}}]
  - {{name: client, node: a, serviceAccount: client}}
  - {{name: plain, node: a, labels: {{app: plain, weft.dev/mesh: disabled}}}}
services:
  - {{name: web, ports: [{{name: http, port: 80, targetPort: http}}]}}
  - {{name: echo, ports: [{{name: tcp, port: 9000, targetPort: tcp-echo}}]}}
  - {{name: strict, ports: [{{name: tcp, port: 9000, targetPort: tcp-echo}}]}}
manifests: [policies]
"""
_REQUIRED = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: asked}
spec:
  endpointSelector: {matchLabels: {app: asked}}
  ingress:
  - authentication: {mode: required}
    toPorts: [{ports: [{port: tcp-echo, protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - authentication: {mode: required}
    fromEndpoints: [{matchLabels: {app: nobody}}]
    toPorts:
    - ports: [{port: http, protocol: TCP}]
      rules: {http: [{path: /never}]}
"""
# As a kubelet asks a pod, by its address (Probe.httpGet).
_PROBE = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=10).status)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    (directory / "policies").mkdir()
    with lab_of(directory, "tn", CONFIG) as lab:
        done = lab.up()
        assert done.returncode == 0, done.stderr
        yield lab


@contextlib.contextmanager
def captured(lab: Lab) -> Iterator[list[bytes]]:
    """The packets on node a's link to the others, once the block has ended."""
    program = (sys.executable, "-c", _CAPTURE, "eth0")
    packets: list[bytes] = []
    with subprocess.Popen(
        ("ip", "netns", "exec", f"weft.{lab.name}.node.a", *program),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield packets
        output, _ = process.communicate(timeout=LIMIT_S)
    packets += [bytes.fromhex(line) for line in output.split()]


def flows(lab: Lab, node: str, *filters: str) -> list[dict[str, object]]:
    done = lab.node(node, "observe", "--last", "100", "-o", "json", *filters)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(lab: Lab) -> int:
    """How often something was, because it was plain: by a pod's filter or by a proxy."""
    told = [flow for node in "ab" for flow in flows(lab, node, "--verdict", "DROPPED")]
    return sum(str(flow.get("reason")).lower() == "mtls_required" for flow in told)


def say(lab: Lab, pod: str, host: str, text: str = MARKER) -> str:
    return lab.python(pod, _SAY, host, "9000", text)


def test_nothing_is_readable_on_the_link_between_nodes(lab: Lab) -> None:
    with captured(lab) as packets:
        done = lab.run("client", "curl", "-sS", "-m", "10", f"http://web/{MARKER}")
        assert (done.stdout, done.stderr) == (f"/{MARKER}", "")
        assert say(lab, "client", "echo") == f"same {len(MARKER)}"
        for address in (ALONE, ALONE6):
            assert say(lab, "client", address) == f"same {len(MARKER)}"
        assert say(lab, "client", "echo", 8192 * MARKER) == f"same {8192 * len(MARKER)}"
    tls = [packet for packet in packets if b"\x3a\xa0" in packet[34:58]]  # port 15008
    assert len(tls) > 20
    assert not [packet for packet in packets if MARKER[:8].encode() in packet]
    # The hellos can be read: version 1.3 was chosen (supported_versions), and whom it is for.
    hellos = b"".join(tls)
    assert b"\x00\x2b\x00\x02\x03\x04" in hellos
    assert b"weft/1" in hellos
    assert b"sa.web.ns.default.cluster.local" in hellos
    assert b"sa.client" not in hellos  # certificates are encrypted


@pytest.mark.parametrize("plain", ["plain", "node/a"])
def test_plain_clients_are_seen_and_taken_by_permissive_pods_only(lab: Lab, plain: str) -> None:
    """A pod that is not in the mesh, and a process that is in no pod."""
    with captured(lab) as packets:
        assert say(lab, plain, ECHO) == f"same {len(MARKER)}"
    assert [packet for packet in packets if MARKER.encode() in packet]  # so the capture can see
    who = "default/plain" if plain == "plain" else "remote-node"
    # What opens a connection tells of it if it is a workload, and so does the filter at the pod.
    for node in "ab" if plain == "plain" else "b":
        way = (node, "--from", who, "--to", "default/echo")
        until(lambda way=way: [one["encryption"] for one in flows(lab, *way)] == ["none"])
    assert say(lab, "client", "strict") == f"same {len(MARKER)}"
    before = refused(lab)
    assert say(lab, plain, STRICT) in ("ConnectionResetError", "ConnectionRefusedError")
    until(lambda: refused(lab) > before)


def _from_host(lab: Lab) -> list[str]:
    """The pods that node b has reached itself."""
    told = [flow for flow in flows(lab, "b", "--from", "host") if "http" not in flow]
    assert {(one["reason"], one["verdict"]) for one in told} <= {("FROM_HOST", "FORWARDED")}
    assert all(one["source"]["labels"] == {"reserved:host": ""} for one in told)  # type: ignore[index]
    return sorted("{namespace}/{pod}".format(**one["destination"]) for one in told)  # type: ignore[arg-type]


def test_policy_may_ask_for_mutual_tls(lab: Lab) -> None:
    """A port at which it is required is STRICT, whatever the pod says of itself."""
    file = lab.file.parent / "policies" / "asked.yaml"
    with captured(lab) as packets:
        assert say(lab, "client", ASKED) == f"same {len(MARKER)}"
    assert [packet for packet in packets if MARKER.encode() in packet]
    file.write_text(_REQUIRED)
    try:
        until(lambda: say(lab, "plain", ASKED) != f"same {len(MARKER)}")
        with captured(lab) as packets:
            assert say(lab, "client", ASKED) == f"same {len(MARKER)}"
        assert not [packet for packet in packets if MARKER[:8].encode() in packet]
        before = refused(lab)
        assert say(lab, "plain", ASKED) in ("ConnectionResetError", "ConnectionRefusedError")
        until(lambda: refused(lab) > before)
        # The node's own connections, such as a kubelet's probes, are none of others: neither STRICT
        # nor what is denied by default, to requests or bytes, is about them.
        assert say(lab, "node/b", ASKED) == f"same {len(MARKER)}"
        for url in (f"http://{WEB}:8080/healthz", "http://[fd00:10:244:1::2]:8080/healthz"):
            assert lab.python("node/b", _PROBE, url) == "200"
        done = lab.run("client", "curl", "-s", "-m", "10", "-o/dev/null", "-w%{http_code}", "web")
        assert done.stdout == "403"
        assert not flows(lab, "b", "--from", "host", "--verdict", "DROPPED")
        # They are told as what they are; the proxy's are not, of which the client's was one.
        until(lambda: len(_from_host(lab)) >= 3)
        assert _from_host(lab) == ["default/asked", "default/web", "default/web"]
    finally:
        file.unlink()
    until(lambda: say(lab, "plain", ASKED) == f"same {len(MARKER)}")


def test_both_nodes_tell_who_it_was(lab: Lab) -> None:
    client, echo = ("spiffe://cluster.local/ns/default/sa/" + name for name in ("client", "echo"))
    for node in "ab":

        def told(node: str = node) -> list[object]:
            return [
                (flow["encryption"], flow["source"]["spiffe_id"], flow["destination"]["spiffe_id"])  # type: ignore[index]
                for flow in flows(lab, node, "--from", "default/client", "--to", "default/echo")
                if flow.get("encryption")
            ]

        until(lambda told=told: ("mtls", client, echo) in told())


def test_pods_of_one_node_are_told_to_be_proven(lab: Lab) -> None:
    """What goes past all proxies; the kernel knows who it is."""
    assert say(lab, "alone", ECHO) == f"same {len(MARKER)}"
    way = ("b", "--from", "default/alone", "--to", "default/echo")
    until(lambda: bool(flows(lab, *way)))
    [flow] = flows(lab, *way)
    ends = (flow["source"]["spiffe_id"], flow["destination"]["spiffe_id"])  # type: ignore[index]
    assert flow["encryption"] == "local"
    assert ends == tuple(
        f"spiffe://cluster.local/ns/default/sa/{one}" for one in ("default", "echo")
    )


@pytest.mark.parametrize("node", ["a", "b"])
def test_a_worker_that_is_killed_ends_nothing_in_good_order(lab: Lab, node: str) -> None:
    """Neither the connection whose turn it is nor any that would have had the next."""
    whole = f"same {len(MARKER)}"
    assert say(lab, "client", "echo") == whole  # its tunnel rests
    one = next(
        one for one in LabDir(lab.run_dir, lab.name).existing_plan().nodes if one.name == node
    )
    with subprocess.Popen(
        lab.arguments("exec", "client", "--", "python3", "-c", _HOLD, "echo"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "10\n"
        assert kill(one, "weft-worker") is not None
        assert process.communicate("\n", LIMIT_S)[0] == "ConnectionResetError\n"
    until_served(one)
    until(lambda: say(lab, "client", "echo") == whole)


def test_an_identity_that_goes_takes_its_connections_with_it(lab: Lab) -> None:
    assert lab.weft("stop", "echo").returncode == 0
    until(lambda: say(lab, "client", "echo") in ("ConnectionResetError", "ConnectionRefusedError"))
    assert lab.weft("start", "echo").returncode == 0
    until(lambda: say(lab, "client", "echo") == f"same {len(MARKER)}")
