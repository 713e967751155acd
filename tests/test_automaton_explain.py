"""`weft bpf automaton` and the kernel's line of `weft explain`, on manifests."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mesh.cli.main import cli

MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: cart}
  ports: [{port: 80, name: http, appProtocol: http, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: cart-0, namespace: shop, labels: {app: cart}}
spec: {nodeName: here, containers: [{name: c, image: c, ports: [{containerPort: 8080}]}]}
status: {podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}], phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec: {nodeName: here, containers: [{name: c, image: c}]}
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}], phase: Running}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{port: 8080, name: http, protocol: TCP}]
endpoints:
- addresses: [10.0.0.2]
  conditions: {ready: true}
  targetRef: {kind: Pod, name: cart-0, namespace: shop}
  nodeName: here
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: cart, port: 80}]
  rules:
  - matches: [{path: {value: /api}, headers: [{name: x-version, value: v2}]}]
    backendRefs: [{name: cart, port: 80}]
  - matches: [{path: {value: /slow}}]
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}]}}
    backendRefs: [{name: cart, port: 80}]
  - matches: [{path: {value: /old}, headers: [{name: cookie, value: "a=1"}]}]
    backendRefs: [{name: cart, port: 80}]
  - matches: [{path: {value: /}}]
    backendRefs: [{name: cart, port: 80}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: cart, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: cart}}
  ingress:
  - toPorts:
    - ports: [{port: "8080", protocol: TCP}]
      rules: {http: [{method: GET, path: "/api/.*"}]}
"""
COOKIE = "header cookie is a=1 is not for tables: cookie is more than its line"


@pytest.fixture
def weft(tmp_path):
    (tmp_path / "all.yaml").write_text(MANIFESTS)

    def run(*arguments: str):
        done = CliRunner().invoke(
            cli, [*arguments, "--manifests", str(tmp_path), "--node", "here", "-o", "json"]
        )
        return done.exit_code, json.loads(done.stdout)

    return run


def test_automata_of_a_service(weft):
    code, found = weft("bpf", "automaton", "shop/cart")
    assert code == 0
    bare, judged = found["items"]
    for one in (bare, judged):
        assert (one["service"], one["listener"]) == ("shop/cart:80", "Service/shop/cart/80")
        told = {rule["rule"]: rule["why"] for rule in one["rules"]}
        assert told == {"0": "", "1": "it changes headers or paths", "2": COOKIE, "3": ""}
        assert {rule["route"] for rule in one["rules"]} == {"HTTPRoute/shop/cart"}
        # What is after the header is cells, and all else that there is.
        assert one["bytes"] > 4 * one["states"] * one["classes"]
    assert bare["generation"] != judged["generation"]
    assert bare["policies"] == []
    assert judged["policies"] == ["CiliumNetworkPolicy shop/cart ingress[0]"]
    assert bare["atoms"] == ["header x-version is v2"]
    assert sorted(judged["atoms"]) == ["header x-version is v2", "method matches GET"]


def test_no_such_service(weft):
    assert weft("bpf", "automaton", "shop/cart:81") == (1, {"items": []})
    assert CliRunner().invoke(cli, ["bpf", "automaton", "a/b/c"]).exit_code == 2


COULD = "it could (HTTP in the kernel is off), between pods of one node"
HEAD = "no: something in this request's head is the proxy's to read"


@pytest.mark.parametrize(
    ("path", "kernel"),
    [
        ("/%61pi/x", HEAD),
        ("/api/x?a=%20", COULD),
        ("/api/x", COULD),
        ("/slow", "no: it changes headers or paths"),
    ],
)
def test_explain_says_whether_the_kernel_decides(weft, path, kernel):
    code, found = weft("explain", "--from", "shop/web-0", "GET", f"http://cart{path}")
    assert (code, found["kernel"]) == (0, kernel)


def test_explain_reads_the_head_as_the_kernel_does(weft):
    ask = ("explain", "--from", "shop/web-0", "GET", "http://cart/api", "-H")
    assert weft(*ask, "X-Version: v2")[1]["kernel"] == COULD
    assert weft(*ask, "Connection: close")[1]["kernel"] == HEAD
    assert weft(*ask, "X-Version: v2", "-H", "x-version: v1")[1]["kernel"] == HEAD
