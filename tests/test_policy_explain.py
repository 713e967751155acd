"""`weft policy explain` and `get`: the deciding rule by name and file, and what would change it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_cli import weft

from tests.support.running import running

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {nodeName: n2}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop}
spec: {nodeName: n2}
status: {podIP: 10.0.0.3}
"""
POLICIES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: requests, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{method: GET, path: /public}]}}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: database, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 5432}]}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: never}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingressDeny: [{toPorts: [{ports: [{port: "22"}]}]}]
  enableDefaultDeny: {ingress: false}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names, namespace: shop}
spec: {endpointSelector: {matchLabels: {app: client}}, egress: [{toFQDNs: [{matchName: a.b}], toPorts: [{}]}]}
"""  # noqa: E501


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    path = tmp_path / "manifests"
    path.mkdir()
    (path / "pods.yaml").write_text(PODS)
    (path / "policies.yaml").write_text(POLICIES)
    return path


def explain(manifests: Path, *arguments: str, to: str = "shop/web") -> tuple[int, dict[str, Any]]:
    code, text, _ = weft(
        "policy", "explain", "--to", to, "--manifests", manifests, "-o", "json", *arguments
    )
    return code, json.loads(text)


CLIENT, OTHER = ("--from", "shop/client"), ("--from", "10.0.0.3")
REQUESTS = "CiliumNetworkPolicy shop/requests"
DEFAULT = f"{REQUESTS}, NetworkPolicy shop/database (default deny)"


def test_the_rule_that_lets_a_request_pass_and_what_without_it(manifests: Path) -> None:
    (manifests / "policies.yaml").write_text(POLICIES.rpartition("---")[0])
    code, answer = explain(manifests, *CLIENT, "--port", "80", "GET", "/public?x=1")
    egress, ingress = answer["sides"]
    assert (code, answer["allowed"]) == (0, True)
    assert (egress["direction"], egress["by"]) == ("egress", "no policy selects it for egress")
    assert ingress == {
        "direction": "ingress",
        "pod": "shop/web",
        "verdict": "allowed",
        "by": f"{REQUESTS} ingress[0]",
        "policies": [REQUESTS],
        "files": [f"{manifests}/policies.yaml document 1"],
        "hints": [
            f"without that rule it is refused by default, by {REQUESTS}, NetworkPolicy"
            " shop/database"
        ],
    }


@pytest.mark.parametrize(
    ("asked", "by", "hints"),
    [
        (
            (*OTHER, "--port", "80"),
            DEFAULT,
            [f"{REQUESTS} ingress[0] allows this port, but not this peer"],
        ),
        (
            (*CLIENT, "--port", "443"),
            DEFAULT,
            [
                f"{REQUESTS} ingress[0] allows this peer, but only TCP 80",
                "NetworkPolicy shop/database ingress[0] allows this peer, but only TCP 5432",
            ],
        ),
        (
            (*CLIENT, "--port", "80", "GET", "/admin"),
            DEFAULT,
            [
                f"{REQUESTS} ingress[0] http[0]: path /admin is not /public",
                "NetworkPolicy shop/database ingress[0] allows this peer, but only TCP 5432",
            ],
        ),
        (
            (*CLIENT, "--port", "80", "POST", "//public"),
            DEFAULT,
            [
                f"{REQUESTS} ingress[0] http[0]: method POST is not GET",
                "NetworkPolicy shop/database ingress[0] allows this peer, but only TCP 5432",
            ],
        ),
        (
            (*CLIENT, "--port", "22"),
            "CiliumClusterwideNetworkPolicy never ingressDeny[0]",
            [
                "CiliumClusterwideNetworkPolicy never ingressDeny[0] denies it, whatever allows it:"
                " it would have to name others or other ports"
            ],
        ),
        (
            ("--from", "192.0.2.1", "--port", "53", "--protocol", "UDP"),
            DEFAULT,
            ["a rule for this peer and port in one of them would allow it"],
        ),
    ],
)
def test_what_refuses_it_and_what_would_have_to_change(
    manifests: Path, asked: tuple[str, ...], by: str, hints: list[str]
) -> None:
    code, answer = explain(manifests, *asked)
    side = answer["sides"][-1]
    assert (code, side["verdict"], side["by"], side["hints"]) == (1, "denied", by, hints)
    assert len(side["files"]) == len(side["policies"]) > 0


def test_a_refused_policy_is_what_denies(manifests: Path) -> None:
    code, answer = explain(manifests, *CLIENT, "--port", "80", "GET", "/public")
    assert code == 1
    assert [side["verdict"] for side in answer["sides"]] == ["denied", "allowed"]
    assert answer["sides"][0]["by"] == "CiliumNetworkPolicy shop/names (default deny)"


def test_what_else_must_hold_and_what_no_policy_decides(manifests: Path) -> None:
    node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nstatus: {addresses: [%s]}"
    address = "{type: InternalIP, address: 10.9.0.1}"
    proven = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: proven, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress: [{fromEndpoints: [{}], authentication: {mode: required}}]
  ingressDeny: [{toPorts: [{ports: [{port: "22"}]}]}]
"""
    (manifests / "policies.yaml").write_text(f"{proven}---\n{node % address}")
    _, answer = explain(manifests, *CLIENT, "--port", "80")
    assert answer["sides"][-1]["verdict"] == "allowed"
    assert "only where mutual TLS proves both ends" in answer["sides"][-1]["hints"][0]
    code, answer = explain(manifests, "--from", "10.9.0.1", "--port", "22")
    assert (code, answer["sides"][-1]["by"]) == (0, "a pod's own node is always allowed")
    assert explain(manifests, *CLIENT, "--port", "22")[0] == 1


def test_people_read_it_in_words(manifests: Path) -> None:
    code, text, _ = weft(
        "policy", "explain", *OTHER, "--to", "shop/web", "--port", "5432", "--manifests", manifests
    )
    assert code == 1
    assert text.splitlines()[-6:] == [
        "ingress of shop/web:             denied",
        f"  by:   {DEFAULT}",
        f"  file: {manifests}/policies.yaml document 1",
        f"  file: {manifests}/policies.yaml document 2",
        "  see:  NetworkPolicy shop/database ingress[0] allows this port, but not this peer",
        "answer: it is refused",
    ]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("--from", "shop/nobody", "--port", "80"), "there is no pod shop/nobody"),
        (("--from", "shop/client", "--port", "http"), "port 'http': give a number"),
        (("--from", "shop/client", "--port", "80", "--protocol", "QUIC"), "QUIC: not one of"),
        (
            ("--from", "shop/client", "--port", "80", "GET", "/..%2f"),
            "the proxy refuses such a request with 400",
        ),
        (("--from", "shop/client", "--port", "80", "GET", "/", "-H", "x"), "-H 'x': not"),
    ],
)
def test_questions_that_are_none(manifests: Path, asked: tuple[str, ...], why: str) -> None:
    code, _, errors = weft(
        "policy", "explain", "--to", "shop/web", "--manifests", manifests, *asked
    )
    assert code == 2
    assert errors.startswith(f"weft: {why}")


def test_a_running_gateway_is_asked(tmp_path: Path, manifests: Path) -> None:
    run_dir = tmp_path / "run"
    at = ("--run-dir", run_dir)
    with running(run_dir, f"--manifests={manifests}", "--workers=1", "--admin=off") as instance:
        instance.await_status(lambda status: status["ready"])
        code, text, _ = weft("policy", "get", *at)
        assert code == 1
        rows = [re.split(" {3,}", line) for line in text.splitlines()]
        assert rows[0] == ["NAMESPACE", "NAME", "KIND", "SELECTS", "STATE"]
        found = {row[1]: row for row in rows}
        assert found["requests"][:4] == ["shop", "requests", "CiliumNetworkPolicy", "shop/web"]
        assert "egress[0].toFQDNs: names of the DNS are not supported" in found["names"][4]
        assert "no policy is enforced; start Weft with --steer" in found["requests"][4]
        items = json.loads(weft("policy", "get", "-n", "shop", "-o", "json", *at)[1])["items"]
        assert [one["name"] for one in items] == ["names", "requests", "database"]
        question = ("policy", "explain", *CLIENT, "--to", "shop/web", "--port", "80")
        code, text, _ = weft(*question, "GET", "/admin", *at)
        assert code == 1
        assert f"{REQUESTS} ingress[0] http[0]: path /admin is not /public" in text
        assert weft(*question, "--protocol", "QUIC", *at)[0] == 2
