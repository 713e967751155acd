"""A lab's authority: identities on every node, replaced under load, and what happens without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from lab_world import LIMIT_S, lab_of, needs_root, until

from mesh.cli.client import ask, ask_authority
from mesh.lab.cgroups import cgroup_root, join_cgroup, members

pytestmark = needs_root

WEB, CART = (f"spiffe://lab.test/ns/shop/sa/{name}" for name in ("web", "cart"))
GATEWAY = "spiffe://lab.test/ns/weft-system/sa/weft-gateway"
CONNECTIONS, LONG = 64, 8
# `make rotation` has them live longer.
LIFE = os.environ.get("WEFT_TEST_SVID_LIFE", "6s")

CONFIG = f"""
nodes: [{{name: a}}, {{name: b}}]
trustDomain: lab.test
svidLife: {LIFE}
pods:
- {{name: web, namespace: shop, node: a, serviceAccount: web}}
- name: cart
  namespace: shop
  node: b
  serviceAccount: cart
  command: [python3, serve.py]
  ports: [{{name: http, port: 8080}}, {{name: tcp, port: 9000}}]
services:
- name: cart
  namespace: shop
  ports: [{{name: http, port: 80, targetPort: http}}, {{name: tcp, port: 90, targetPort: tcp}}]
"""

# HTTP says on which of its connections it was asked. TCP is an echo.
SERVE = """
import asyncio, itertools

numbers = itertools.count(10000)

async def serve(reader, writer):
    number = next(numbers)
    while b"\\r\\n\\r\\n" in await reader.read(1000):
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\n%d" % number)
    writer.close()

async def echo(reader, writer):
    while data := await reader.read(1000):
        writer.write(data)
    writer.close()

async def main():
    await asyncio.start_server(echo, None, 9000)
    await (await asyncio.start_server(serve, None, 8080)).serve_forever()

asyncio.run(main())
"""

# Requests on so many connections, and bytes on so many others, each of which stays the same; until
# standard input ends. Then what came of them. `first`, `last`: the connections of the backend
# that had the first and the last request of each.
LOAD = """
import asyncio, json, sys

async def asks(done):
    reader, writer = await asyncio.open_connection("cart", 80)
    seen = []
    while not done.is_set():
        writer.write(b"GET / HTTP/1.1\\r\\nHost: cart\\r\\n\\r\\n")
        head = await asyncio.wait_for(reader.readuntil(b"\\r\\n\\r\\n"), 20)
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(head)
        seen.append(int(await reader.readexactly(5)))
        await asyncio.sleep(0.25)
    writer.close()
    return seen

async def echoes(done):
    reader, writer = await asyncio.open_connection("cart", 90)
    seen = []
    while not done.is_set():
        word = b"%d." % len(seen)
        writer.write(word)
        if await asyncio.wait_for(reader.readexactly(len(word)), 20) != word:
            raise ValueError(word)
        seen.append(0)
        await asyncio.sleep(0.25)
    writer.write_eof()
    if await reader.read():
        raise ValueError("more than was said")
    return seen

async def main():
    done = asyncio.Event()
    work = [asyncio.ensure_future(asks(done)) for _ in range(int(sys.argv[1]))]
    long = [asyncio.ensure_future(echoes(done)) for _ in range(int(sys.argv[2]))]
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    done.set()
    seen = await asyncio.gather(*work, *long, return_exceptions=True)
    bad = [repr(one) for one in seen if isinstance(one, BaseException)]
    asked = [] if bad else seen[:len(work)]
    print(json.dumps({
        "bad": bad[:5],
        "least": 0 if bad else min(map(len, seen)),
        "first": [one[0] for one in asked],
        "last": [one[-1] for one in asked],
    }))

asyncio.run(main())
"""

# Says what it does with a connection that stays open: each line of its input is echoed there.
HOLD = """
import socket, sys
try:
    with socket.create_connection(("cart", 90), timeout=60) as connection:
        for line in sys.stdin:
            connection.sendall(line.encode())
            print("same" if connection.recv(100) == line.encode() else "ended", flush=True)
        print("closed" if not connection.recv(100) else "more", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lab")
    (directory / "serve.py").write_text(SERVE)
    with lab_of(directory, "certs", CONFIG) as lab:
        done = lab.up("--wait", "90")
        assert done.returncode == 0, done.stderr
        # On a machine with much else to do the lab does not wait that long.
        until(lambda: all(node(lab, name)["ready"] for name in ("a", "b")))
        yield lab


def authority(lab, method, what):
    """Asked at its own socket, as `weft certs` does."""
    return ask_authority(lab.run_dir / lab.name / "authority", method, what)


def roots(lab):
    """Subjects and states of the authority's roots."""
    return {
        one["subject"]: one["state"]
        for one in authority(lab, "GET", "/v1/state")["certificates"]
        if one["role"] == "root"
    }


def node(lab, name, what="/status"):
    return ask(lab.run_dir / lab.name / "nodes" / f"{name}.weft", what)


def issuers(lab, name):
    return {one["spiffeId"]: one["issuer"] for one in node(lab, name)["svids"]}


def fetch(lab):
    """The status of a request."""
    ask = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "10")
    return lab.run("web", *ask, "http://cart/").stdout


def outliving(lab):
    """How many tunnels the nodes say are older than a certificate they were made with."""
    return {name: node(lab, name)["tunnels"]["outliving"] for name in ("a", "b")}


def metric(lab, name, label):
    """Of node a, by a label."""
    found = node(lab, "a", "/metrics-json")["items"]
    return {one["labels"][label]: one["value"] for one in found if one["name"] == name}


def test_every_node_has_the_identities_of_its_own_pods(lab):
    assert set(issuers(lab, "a")) == {WEB, GATEWAY}
    assert set(issuers(lab, "b")) == {CART, GATEWAY}
    for name in ("a", "b"):
        status = node(lab, name)
        assert all(one["notAfter"] and not one["why"] for one in status["svids"])
        sections = node(lab, name, "/config")["sections"]
        assert "BEGIN CERTIFICATE" in sections["bundle/lab.test"]["roots_pem"]
        assert sections["settings"]["gateway_spiffe_id"] == GATEWAY
    assert fetch(lab) == "200"
    assert "the authority of lab.test runs" in lab.weft("status").stdout


def test_replaced_under_load(lab):
    """SVIDs, the intermediate and the root: no request fails, HTTP is on other tunnels at the end,
    and those of TCP are the same ones, older than their certificates, as status says."""
    before = roots(lab)
    counts = (str(CONNECTIONS), str(LONG))
    with subprocess.Popen(
        [*lab.arguments("exec"), "web", "--", "python3", "-c", LOAD, *counts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as load:
        assert load.stdout.readline() == "begun\n"
        old = {name: issuers(lab, name) for name in ("a", "b")}
        authority(lab, "POST", "/v1/rotate/intermediate")
        until(lambda: all(not set(old[n].values()) & set(issuers(lab, n).values()) for n in old))
        authority(lab, "POST", "/v1/rotate/root")
        until(lambda: "retiring" in roots(lab).values())
        until(lambda: len(roots(lab)) == 1)
        until(lambda: outliving(lab) == {"a": LONG, "b": LONG})
        shown = lab.node("a", "status").stdout
        said, _ = load.communicate(timeout=LIMIT_S)
    told = json.loads(said)
    assert told["bad"] == []
    assert told["least"] > 0
    assert not set(told["first"]) & set(told["last"])
    assert f"older than their certificates: {LONG}" in shown
    assert not set(before) & set(roots(lab))
    for name in ("a", "b"):
        pem = node(lab, name, "/config")["sections"]["bundle/lab.test"]["roots_pem"]
        assert pem.count("BEGIN CERTIFICATE") == 1
        assert not any("SVID" in text for text in node(lab, name)["degraded"])
    until(lambda: outliving(lab) == {"a": 0, "b": 0})


def test_without_the_authority(lab):
    """What is held stays in use, and people see the time count down; what has expired is gone, open
    connections with it, and status says why; then it is back."""
    cgroup = f"{cgroup_root()}/{lab.name}/_system/_authority"
    (pid,) = members(cgroup)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    os.kill(pid, signal.SIGKILL)
    expires = f"the SVID of {WEB} cannot be renewed, it expires in"

    def degraded(name="a"):
        return " ".join(node(lab, name)["degraded"])

    def expired():
        """On a busy machine the lives of `make test` end before everything has been looked at."""
        return any("has no valid SVID, so its connections" in degraded(name) for name in "ab")

    with subprocess.Popen(
        [*lab.arguments("exec"), "web", "--", "python3", "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as held:

        def echoed():
            held.stdin.write("word\n")
            return held.stdout.readline()

        assert echoed() == "same\n"
        until(lambda: expires in degraded())
        first = degraded()
        assert echoed() == "same\n"
        assert fetch(lab) == "200" or expired()
        until(lambda: (expires in degraded() and degraded() != first) or expired())
        assert lab.weft("status").returncode == 1
        until(lambda: f"{WEB} has no valid SVID, so its connections" in degraded())
        held.stdin.close()
        assert held.stdout.readline() == "ConnectionResetError\n"
    assert "Connection refused" in degraded()
    assert f"svid/{WEB}" not in node(lab, "a", "/config")["sections"]
    assert fetch(lab) == "503"
    assert metric(lab, "weft_svid_expiry_seconds", "spiffe_id")[WEB] == 0
    assert metric(lab, "weft_svid_issuance_failures_total", "reason")["no_answer"] > 0

    with subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: join_cgroup(cgroup),
    ) as process:
        until(lambda: all(one["notAfter"] for one in node(lab, "a")["svids"]))
        until(lambda: "SVID" not in degraded())
        until(lambda: fetch(lab) == "200")
        process.kill()
