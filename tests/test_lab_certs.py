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
CONNECTIONS = 64

CONFIG = """
nodes: [{name: a}, {name: b}]
trustDomain: lab.test
svidLife: 6s
pods:
- {name: web, namespace: shop, node: a, serviceAccount: web}
- name: cart
  namespace: shop
  node: b
  serviceAccount: cart
  command: [python3, serve.py]
  ports: [{name: http, port: 8080}]
services:
- {name: cart, namespace: shop, ports: [{name: http, port: 80, targetPort: http}]}
"""

SERVE = """
import asyncio

async def serve(reader, writer):
    while (await reader.readuntil(b"\\r\\n\\r\\n")):
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello")

async def main():
    await (await asyncio.start_server(serve, None, 8080)).serve_forever()

asyncio.run(main())
"""

# Requests on so many connections until standard input ends; then what came of them.
LOAD = """
import asyncio, json, sys

async def one(done, bad):
    reader, writer = await asyncio.open_connection("cart", 80)
    count = 0
    while not done.is_set():
        writer.write(b"GET / HTTP/1.1\\r\\nHost: cart\\r\\n\\r\\n")
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\\r\\n\\r\\n"), 20)
            body = await reader.readexactly(5)
        except Exception as error:
            bad.append(repr(error))
            return count
        if not head.startswith(b"HTTP/1.1 200") or body != b"hello":
            bad.append(repr(head + body))
            return count
        count += 1
        await asyncio.sleep(0.25)
    writer.close()
    return count

async def main():
    done, bad = asyncio.Event(), []
    work = [asyncio.ensure_future(one(done, bad)) for _ in range(int(sys.argv[1]))]
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    done.set()
    counts = await asyncio.gather(*work)
    print(json.dumps({"requests": sum(counts), "least": min(counts), "bad": bad[:5]}))

asyncio.run(main())
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
    done = lab.run("web", "curl", "-sS", "--max-time", "10", "http://cart/")
    return done.stdout


def test_every_node_has_the_identities_of_its_own_pods(lab):
    assert set(issuers(lab, "a")) == {WEB, GATEWAY}
    assert set(issuers(lab, "b")) == {CART, GATEWAY}
    for name in ("a", "b"):
        status = node(lab, name)
        assert all(one["notAfter"] and not one["why"] for one in status["svids"])
        sections = node(lab, name, "/config")["sections"]
        assert "BEGIN CERTIFICATE" in sections["bundle/lab.test"]["roots_pem"]
        assert sections["settings"]["gateway_spiffe_id"] == GATEWAY
    assert fetch(lab) == "hello"
    assert "the authority of lab.test runs" in lab.weft("status").stdout


def test_replaced_under_load(lab):
    """SVIDs many times, the intermediate and the root, and nobody notices."""
    before = roots(lab)
    with subprocess.Popen(
        [*lab.arguments("exec"), "web", "--", "python3", "-c", LOAD, str(CONNECTIONS)],
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
        said, _ = load.communicate(timeout=LIMIT_S)
    told = json.loads(said)
    assert told["bad"] == []
    assert told["least"] > 0
    assert not set(before) & set(roots(lab))
    for name in ("a", "b"):
        pem = node(lab, name, "/config")["sections"]["bundle/lab.test"]["roots_pem"]
        assert pem.count("BEGIN CERTIFICATE") == 1
        assert not any("SVID" in text for text in node(lab, name)["degraded"])


def test_without_the_authority(lab):
    """What is held stays in use; what has expired is gone, and status says why; then it is back."""
    cgroup = f"{cgroup_root()}/{lab.name}/_system/_authority"
    (pid,) = members(cgroup)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    os.kill(pid, signal.SIGKILL)
    assert fetch(lab) == "hello"

    def degraded():
        return " ".join(node(lab, "a")["degraded"])

    until(lambda: f"the SVID of {WEB} cannot be renewed, it expires in" in degraded())
    assert lab.weft("status").returncode == 1
    until(lambda: f"{WEB} has no valid SVID, so its connections" in degraded())
    assert "Connection refused" in degraded()
    assert f"svid/{WEB}" not in node(lab, "a", "/config")["sections"]

    with subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: join_cgroup(cgroup),
    ) as process:
        until(lambda: all(one["notAfter"] for one in node(lab, "a")["svids"]))
        until(lambda: "SVID" not in degraded())
        until(lambda: fetch(lab) == "hello")
        process.kill()
