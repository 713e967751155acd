"""Further manifests in a lab: its nodes serve Gateways to clients outside. Needs root."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_world import Lab, lab_of, needs_root, until

pytestmark = needs_root

_BACKEND = Path(__file__).parents[1] / "examples" / "lab" / "backend.py"
CONFIG = f"""
nodes: [{{name: a}}, {{name: b}}]
outside: [{{name: client}}]
pods:
  - name: web
    node: a
    command: [python3, {_BACKEND}, "8080"]
    ports: [{{name: http, port: 8080}}]
  - name: api
    node: b
    command: [python3, {_BACKEND}, "8080"]
    ports: [{{name: http, port: 8080}}]
services:
  - {{name: web, ports: [{{port: 80, targetPort: http}}]}}
  - {{name: api, ports: [{{port: 80, targetPort: http}}]}}
manifests: [gateway.yaml, routes]
"""
_GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: weft}
spec: {controllerName: weft.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: front, namespace: default}
spec:
  gatewayClassName: weft
  listeners: [{name: http, port: 80, protocol: HTTP}]
"""
_ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: %s, namespace: default}
spec:
  parentRefs: [{name: front}]
  rules:
    - matches: [{path: {value: %s}}]
      backendRefs: [{name: %s, port: 80}]
"""
# The status, and what the backend said.
_ASK = """
import sys, urllib.error, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=5) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""
NODES = {"a": ("172.18.0.2", "[fd00:172:18::2]"), "b": ("172.18.0.3", "[fd00:172:18::3]")}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab_of(tmp_path_factory.mktemp("lab"), "g", CONFIG) as lab:
        directory = lab.file.parent
        (directory / "gateway.yaml").write_text(_GATEWAY)
        (directory / "routes").mkdir()
        (directory / "routes" / "web.yaml").write_text(_ROUTE % ("web", "/", "web"))
        done = lab.up()
        assert done.returncode == 0, done.stderr
        yield lab


def answer(lab: Lab, url: str) -> str:
    """The pod that answered, else the status."""
    status, _, body = lab.python("client", _ASK, url).partition(" ")
    return json.loads(body)["pod"] if status == "200" else status


@pytest.mark.parametrize("family", [0, 1])
@pytest.mark.parametrize("node", ["a", "b"])
def test_every_node_serves_the_gateway_with_pods_of_all(lab: Lab, node: str, family: int) -> None:
    # Addresses that are served are known a moment after the pods are ready.
    until(lambda: answer(lab, f"http://{NODES[node][family]}/") == "web")


def test_an_edit_and_a_new_file_take_effect_at_once(lab: Lab) -> None:
    url, routes = f"http://{NODES['a'][0]}", lab.file.parent / "routes"
    until(lambda: answer(lab, f"{url}/api") == "web")
    (routes / "api.yaml").write_text(_ROUTE % ("api", "/api", "api"))
    until(lambda: answer(lab, f"{url}/api") == "api")
    (routes / "api.yaml").write_text(_ROUTE % ("api", "/api", "nobody"))
    until(lambda: answer(lab, f"{url}/api") == "500")
    (routes / "api.yaml").unlink()
    until(lambda: answer(lab, f"{url}/api") == "web")


def test_nothing_in_the_lab_is_a_problem(lab: Lab) -> None:
    for node in NODES:
        done = lab.node(node, "get", "problems", "-o", "json")
        found = [one for one in json.loads(done.stdout)["items"] if one["level"] != "note"]
        assert found == []
