"""Policies in the language of manifests: what is in force for pods, what is refused and how it
fails closed. What rules mean is compared elsewhere (test_policy_model)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.control import ControlPlane, Options
from gateway.workloads import LabelSet
from mesh.model.identity import FIRST_CIDR, Reserved
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.policyconfig import CidrSection, Direction, PolicyRule, PolicySection, PortRange
from mesh.policy import cidr, sections
from mesh.policy.cilium_http import MAX_REGEX_SIZE
from mesh.policy.spec import MAX_CIDRS, MAX_HTTP, MAX_RULES
from mesh.sources.directory import Manifests
from tests.gateway_world import World, join, objects
from tests.test_gateway_workloads import MESH, piece, pod, service


def world(*texts: str, options: Options = MESH) -> World:
    result = World(options)
    result.apply(join(*texts))
    return result


def cnp(spec: Any, name: str = "p", annotations: str = "{}", more: str = "") -> str:
    text = spec if isinstance(spec, str) else yaml.safe_dump(spec, default_flow_style=True)
    return f"""
kind: CiliumNetworkPolicy
metadata: {{name: {name}, annotations: {annotations}}}
spec: {text}{more}
"""


def of(world: World, pod: str = "p", namespace: str = "default") -> PolicySection:
    section = world.sections[f"policy/{namespace}/{pod}"]
    assert isinstance(section, PolicySection)
    return section


def rules(direction: Direction) -> list[PolicyRule]:
    """Of policies, not those that are always there."""
    return [rule for rule in direction.rules if rule.source[0] != "("]


def why(
    world: World, kind: str = "CiliumNetworkPolicy", name: str = "p", type: str = "Accepted"
) -> str:
    return world.message(kind, name, type)


ALL = "{endpointSelector: {}, "
UNKNOWN = "policy//"
AUDITED = '{weft.dev/policy-audit: "true"}'
POD = pod()
IN, OUT = "ingress[0].toPorts[0]", "egress[0].toPorts[0]"
HTTP = "toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET}]}}]"


def asks(rule: str) -> str:
    """An ingress rule about requests."""
    return f"ingress: [{{{HTTP.replace('method: GET', rule)}}}]"


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ("egress: [{toFQDNs: [{matchName: a.example}]}]", "egress[0].toFQDNs"),
        ("egress: [{toNodes: [{}]}]", "egress[0].toNodes"),
        ("ingress: [{fromNodes: [{}]}]", "ingress[0].fromNodes"),
        ("ingress: [{fromGroups: [{aws: {region: x}}]}]", "ingress[0].fromGroups"),
        ("egressDeny: [{toGroups: [{aws: {region: x}}]}]", "egressDeny[0].toGroups"),
        ("ingress: [{fromEndpoints: [{}], fromCIDR: [10.0.0.0/8]}]", "ingress[0].fromCIDR"),
        ("ingress: [{fromCIDR: [10.0.0.0]}]", ""),
        ("ingress: [{fromCIDR: [10.0.0.0/33]}]", "ingress[0].fromCIDR[0]"),
        ("egress: [{toCIDRSet: [{cidrGroupRef: g}]}]", "egress[0].toCIDRSet[0].cidrGroupRef"),
        (
            "egress: [{toCIDRSet: [{cidr: 10.0.0.0/8, except: [11.0.0.0/8]}]}]",
            "egress[0].toCIDRSet[0].except[0]",
        ),
        ("egress: [{toServices: [{}]}]", "egress[0].toServices[0]"),
        ("ingress: [{authentication: {mode: test-always-fail}}]", "ingress[0].authentication.mode"),
        ("ingressDeny: [{fromEntities: [world, host]}]", "ingressDeny[0].fromEntities"),
        ("ingressDeny: [{fromRequires: [{}]}]", "ingressDeny[0].fromRequires"),
        ("ingress: [{icmps: [{fields: [{type: 300}]}]}]", "ingress[0].icmps[0].fields[0].type"),
        (
            "ingress: [{icmps: [{fields: [{type: 8}]}], toPorts: [{ports: [{port: '80'}]}]}]",
            "ingress[0].icmps",
        ),
        ("ingress: [{toPorts: [{ports: [{port: '70000'}]}]}]", f"{IN}.ports[0].port"),
        (
            "ingress: [{toPorts: [{ports: [{port: '80', endPort: 79}]}]}]",
            f"{IN}.ports[0].endPort",
        ),
        ("egress: [{toPorts: [{rules: {dns: [{matchPattern: '*'}]}}]}]", f"{OUT}.rules.dns"),
        ("ingress: [{toPorts: [{rules: {kafka: [{topic: t}]}}]}]", f"{IN}.rules.kafka"),
        ("ingress: [{toPorts: [{rules: {l7proto: x}}]}]", f"{IN}.rules.l7proto"),
        ("ingress: [{toPorts: [{rules: {l7: [{a: b}]}}]}]", f"{IN}.rules.l7"),
        ("egress: [{toPorts: [{serverNames: [a]}]}]", f"{OUT}.serverNames"),
        ("egress: [{toPorts: [{listener: {name: a}}]}]", f"{OUT}.listener"),
        ("egress: [{toPorts: [{originatingTLS: {secret: {}}}]}]", f"{OUT}.originatingTLS"),
        ("egress: [{toPorts: [{terminatingTLS: {secret: {}}}]}]", f"{OUT}.terminatingTLS"),
        (
            "ingress: [{toPorts: [{ports: [{port: '80'}], rules: {http: [{}]}}]}]",
            f"{IN}.ports[0].protocol",
        ),
        (
            "ingress: [{toPorts: [{ports: [{port: '0', protocol: TCP}], rules: {http: [{}]}}]}]",
            f"{IN}.ports[0].port",
        ),
        ("ingress: [{toPorts: [{rules: {http: [{}]}}]}]", f"{IN}.ports"),
        (asks("path: a(b"), f"{IN}.rules.http[0].path"),
        (asks("headers: [a:b]"), f"{IN}.rules.http[0].headers[0]"),
        (
            asks("headerMatches: [{name: host, value: a, mismatch: REPLACE}]"),
            f"{IN}.rules.http[0].headerMatches[0].name",
        ),
        (
            asks("headerMatches: [{name: a, secret: {name: s}}]"),
            f"{IN}.rules.http[0].headerMatches[0].secret",
        ),
        (
            asks("headerMatches: [{name: a, mismatch: ADD}]"),
            f"{IN}.rules.http[0].headerMatches[0].value",
        ),
        ("description: nothing", ""),
    ],
)  # fmt: skip
def test_what_is_not_enforced_is_refused_by_field(rule: str, field: str) -> None:
    w = world(POD, cnp(f"{ALL}{rule}}}"))
    if field:
        assert why(w).startswith(f"spec.{field}: ")
    elif "fromCIDR" in rule:  # a single address
        assert why(w) == ""
    else:
        assert why(w).startswith("spec: has no rules")


def test_a_refused_policy_denies_by_default_and_says_so() -> None:
    w = world(
        POD,
        cnp(f"{ALL}ingress: [{{fromEntities: [all]}}], egress: [{{toFQDNs: [{{}}]}}]}}"),
        cnp(f"{ALL}ingress: [{{fromEntities: [world]}}]}}", "other"),
    )
    assert why(w).endswith(
        "until that is mended, nothing of it is in force, and ingress and egress of the pods that"
        " it selects is denied"
    )
    section = of(w)
    assert [rule.source for rule in rules(section.ingress)] == [
        "CiliumNetworkPolicy default/other ingress[0]"
    ]
    assert section.egress == Direction(True, selected_by=("CiliumNetworkPolicy default/p",))


def test_a_refused_policy_with_deny_rules_denies_whatever_others_allow() -> None:
    w = world(
        POD,
        cnp(f"{ALL}ingressDeny: [{{fromNodes: [{{}}]}}]}}"),
        cnp(f"{ALL}ingress: [{{fromEntities: [all]}}]}}", "other"),
    )
    denies = [rule for rule in of(w).ingress.rules if rule.deny]
    assert [(rule.peers, rule.ports) for rule in denies] == [(None, ())]


def test_a_refused_policy_that_requires_authentication_denies_whatever_others_allow() -> None:
    rule = "ingress: [{fromEntities: [all], authentication: {mode: required}}, {fromNodes: [{}]}]"
    allows = cnp(f"{ALL}ingress: [{{fromEntities: [all]}}]}}", "other")
    w = world(POD, cnp(f"{ALL}{rule}}}"), allows)
    denies = [rule for rule in of(w).ingress.rules if rule.deny]
    assert [(rule.peers, rule.ports) for rule in denies] == [(None, ())]


def test_one_bad_policy_affects_nothing_else() -> None:
    good = cnp(f"{ALL}ingress: [{{fromEntities: [world]}}]}}", "good")
    alone = world(pod("q", "10.0.0.2", namespace="n"), POD.replace("app: a", "app: b"), good)
    bad = cnp("{endpointSelector: {matchLabels: {app: x}}, egress: [{toNodes: [{}]}]}", "bad")
    both = world(pod("q", "10.0.0.2", namespace="n"), POD.replace("app: a", "app: b"), good, bad)
    assert of(both) == of(alone)
    assert both.of("policy").keys() == alone.of("policy").keys()


_UNREADABLE = {
    # What is written of a policy for pods with app a; which sides it closes, and whether above what
    # others allow.
    "a rule": ("CiliumNetworkPolicy", {"ingress": [{"fromEntities": 7}]}, {"ingress": False}),
    "a denial": (
        "CiliumNetworkPolicy",
        {"egress": [{}], "ingressDeny": [{"oops": 1}]},
        {"egress": False, "ingress": True},
    ),
    "a field": ("CiliumNetworkPolicy", {"ingresDeny": [{}]}, {"egress": True, "ingress": True}),
    "a requirement": (
        "CiliumNetworkPolicy",
        {"ingress": [{"fromRequires": [{"matchLabels": {"a": "b"}}], "oops": 1}]},
        {"ingress": True},
    ),
    "of all namespaces": (
        "CiliumClusterwideNetworkPolicy",
        {"egress": [{"toPorts": "x"}]},
        {"egress": False},
    ),
    "NetworkPolicy": (
        "NetworkPolicy",
        {"ingress": [{"from": [{"ipBlock": {"cidr": "300.0.0.0/8"}}]}], "policyTypes": ["Ingress"]},
        {"ingress": False},
    ),
    "NetworkPolicy of a newer version": (
        "NetworkPolicy",
        {"ingress": [{"fromNew": [{}]}], "policyTypes": ["Ingress"]},
        {"ingress": False},
    ),
    "NetworkPolicy's types": (
        "NetworkPolicy",
        {"policyTypes": ["ingress"]},
        {"egress": False, "ingress": False},
    ),
}


@pytest.mark.parametrize("case", _UNREADABLE)
def test_a_policy_that_cannot_be_read_denies_for_whom_it_selects(case: str, tmp_path: Path) -> None:
    kind, spec, closed = _UNREADABLE[case]
    selector = "podSelector" if kind == "NetworkPolicy" else "endpointSelector"
    api = "networking.k8s.io/v1" if kind == "NetworkPolicy" else "cilium.io/v2"
    metadata: dict[str, Any] = {"name": "p"}
    manifests, w = Manifests(tmp_path), world(POD, pod("q", "10.0.0.2", labels="{app: b}"))
    everybody = cnp("{endpointSelector: {}, ingress: [{fromEntities: [all]}],"
                    " egress: [{toEntities: [all]}]}", "open")  # fmt: skip
    w.apply(everybody)

    def write(**spec: Any) -> None:
        manifest = {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(manifest))
        update = manifests.scan()
        w.change(update.changes)
        told.append(" ".join(problem.message for problem in update.problems))

    told: list[str] = []
    metadata["annotations"] = {"weft.dev/policy-audit": "true"}
    write(**{selector: {"matchLabels": {"app": "a"}}}, **spec)
    directions = of(w).ingress, of(w).egress
    assert all(rule.audit for one in directions for rule in one.rules if rule.deny)
    del metadata["annotations"]
    write(**{selector: {"matchLabels": {"app": "a"}}}, **spec)
    assert "until that is mended, it denies for whom it selects" in told[-1]
    section = of(w)
    for side in ("ingress", "egress"):
        direction = getattr(section, side)
        assert any(name.split()[1] in ("p", "default/p") for name in direction.selected_by) == (
            side in closed
        )
        assert any(rule.deny for rule in direction.rules) == closed.get(side, False)
    assert not any(rule.deny for rule in of(w, "q").ingress.rules)
    namespace = "" if kind == "CiliumClusterwideNetworkPolicy" else "default"
    status = w.statuses[kind, ObjectKey(namespace, "p")]
    assert status.conditions[0].status == "False"
    assert "spec" in status.conditions[0].message
    # Another selector is followed; one that cannot be read changes nothing, but if it is the first.
    for labels in ({"app": "b"}, 7):
        write(**{selector: {"matchLabels": labels}}, **spec)
        assert of(w).ingress.selected_by == ("CiliumNetworkPolicy default/open",)
        found = [*of(w, "q").ingress.selected_by, *of(w, "q").egress.selected_by]
        assert any(name.split()[1] in ("p", "default/p") for name in found)
    (tmp_path / "p.yaml").unlink()
    w.change(manifests.scan().changes)
    write(**{selector: {"matchLabels": 7}}, **spec)
    assert "whom it selects cannot be read, so it denies nothing" in told[-1]
    assert not any(name.split()[1] in ("p", "default/p") for name in of(w, "q").ingress.selected_by)


def test_specs_of_which_nobody_knows_whom_they_select_are_told_of(tmp_path: Path) -> None:
    specs = [{"endpointSelector": {"matchLabels": {"app": one}}, "oops": 1} for one in ("a", 7)]
    policy = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "specs": specs}
    manifests, w = Manifests(tmp_path), world(POD)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**policy, "metadata": {"name": "p"}}))
    w.change(manifests.scan().changes)
    assert any(rule.deny for rule in of(w).ingress.rules)
    assert "whom 1 of its specs selects cannot be read, so it denies nothing" in why(w)


def test_a_defect_in_reading_one_policy_denies_for_its_pods_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(view: Any, peers: Any) -> Any:
        if peers and "health" in peers.entities:
            raise ZeroDivisionError
        return peers_resolve(view, peers)

    peers_resolve = sections.resolve
    monkeypatch.setattr(sections, "resolve", resolve)
    of_a = "endpointSelector: {matchLabels: {app: a}}, ingress: [{fromEntities: [%s]}]"
    control = ControlPlane(MESH)
    texts = (
        POD,
        pod("q", "10.0.0.2", labels="{app: b}"),
        cnp(f"{{{of_a % 'health'}}}"),
        cnp(f"{{{of_a % 'world'}}}", "good"),
        cnp(f"{{{of_a.replace('app: a', 'app: b') % 'world'}}}", "other"),
    )
    outcome = control.apply(objects(join(*texts)))
    assert {table for table, _ in outcome.failures} == {"resolved"}
    for policy, said in (("p", "a defect in Weft"), ("good", ""), ("other", "")):
        status = outcome.statuses["CiliumNetworkPolicy", ObjectKey("default", policy)]
        assert status.conditions[1].message.startswith(said)
        assert (status.conditions[1].status == "True") == (not said)
    for name, denied in (("p", True), ("q", False)):
        section = outcome.put[f"policy/default/{name}"]
        assert isinstance(section, PolicySection)
        assert any(rule.deny and rule.peers is None for rule in section.ingress.rules) == denied
        assert section.egress.default_deny == denied


def test_huge_policies_are_refused() -> None:
    many = [{"fromEndpoints": [{"matchLabels": {"n": str(i)}}]} for i in range(MAX_RULES + 1)]
    w = world(POD, cnp({"endpointSelector": {}, "ingress": many}))
    assert "1001 rules, 1000 are the most" in why(w)
    assert not rules(of(w).ingress)
    for more in ([{"headers": ["x-a"]}] * MAX_HTTP, [{"headers": ["x-a"] * MAX_HTTP}]):
        ports = [{"port": "80", "protocol": "TCP"}]
        group = {"toPorts": [{"ports": ports, "rules": {"http": more}}]}
        w = world(POD, cnp({"endpointSelector": {}, "ingress": [group]}))
        assert "HTTP rules and headers, 2000 are the most" in why(w)
        assert not rules(of(w).ingress)
    cidrs = [f"10.{i // 256}.{i % 256}.0/24" for i in range(MAX_CIDRS + 1)]
    w = world(POD, cnp({"endpointSelector": {}, "egress": [{"toCIDR": cidrs}]}))
    assert "5001 CIDRs, 5000 are the most" in why(w)
    assert not w.of("cidr")
    blocks = [{"ipBlock": {"cidr": cidr}} for cidr in cidrs]
    spec = {"podSelector": {}, "ingress": [{"from": blocks}]}
    w = world(
        POD, yaml.safe_dump({"kind": "NetworkPolicy", "metadata": {"name": "p"}, "spec": spec})
    )
    assert "5001 CIDRs, 5000 are the most" in why(w, "NetworkPolicy")
    assert not w.of("cidr")
    assert of(w).ingress.default_deny


def test_expressions_are_bounded_one_by_one_and_together() -> None:
    def policy(*paths: str) -> str:
        group = {
            "ports": [{"port": "80", "protocol": "TCP"}],
            "rules": {"http": [{"path": path} for path in paths]},
        }
        return cnp({"endpointSelector": {}, "ingress": [{"toPorts": [group]}]})

    assert "instructions" in why(world(POD, policy("/([a-z]{100}){10}")))
    large = "/[a-z]{200}"
    w = world(POD, policy(*(f"{large}{i}" for i in range(MAX_REGEX_SIZE // 200 + 1))))
    assert "too large together" in why(w)
    assert why(world(POD, policy(large, large))) == ""


# --- what is in force ----------------------------------------------------------------------------


def test_sections_are_only_for_pods_of_this_node_that_are_selected() -> None:
    w = world(
        pod("here", "10.0.0.1"),
        pod("there", "10.0.0.2", node="n2"),
        pod("other", "10.0.0.3", labels="{app: other}"),
        cnp("{endpointSelector: {matchLabels: {app: a}}, ingress: [{}]}"),
    )
    assert w.of("policy").keys() == {"policy/default/here", UNKNOWN}
    w.delete("CiliumNetworkPolicy", "p")
    assert not w.of("policy")


def test_pods_that_are_not_known_yet_are_denied_the_directions_in_which_some_policy_denies() -> (
    None
):
    def sides(*policies: str) -> tuple[bool, bool] | None:
        section = world(*policies).sections.get(UNKNOWN)
        if section is None:
            return None
        assert isinstance(section, PolicySection)
        assert section.addresses == ("::",)
        return section.ingress.default_deny, section.egress.default_deny

    ingress = cnp(f"{ALL}ingress: [{{}}]}}")
    assert sides() is None
    assert sides(ingress) == (True, False)
    assert sides(ingress, cnp(f"{ALL}egress: [{{}}]}}", "other")) == (True, True)
    assert sides(cnp(f"{ALL}ingress: [{{}}]}}", annotations=AUDITED)) is None
    free = "enableDefaultDeny: {ingress: false, egress: false}"
    assert sides(cnp(f"{ALL}ingress: [{{}}], {free}}}")) is None
    deny = cnp(f"{ALL}egressDeny: [{{toCIDR: [10.7.0.0/16]}}], {free}}}")
    assert sides(deny) == (False, True)
    section = world(ingress).sections[UNKNOWN]
    assert isinstance(section, PolicySection)
    assert [rule.peers for rule in section.ingress.rules] == [{Reserved.HOST}]


def test_ingress_from_the_own_node_always_passes() -> None:
    section = of(world(POD, cnp(f"{ALL}ingress: [{{}}], egress: [{{}}]}}")))
    assert [rule.peers for rule in section.ingress.rules] == [{Reserved.HOST}]
    assert section.egress.rules == ()


def test_named_ports_are_the_pods_own_for_ingress_and_the_peers_for_egress() -> None:
    ports = "containers: [{name: c, ports: [{name: web, containerPort: %d}]}]"
    one = pod("one", "10.0.0.1").replace("spec: {", f"spec: {{{ports % 8080}, ")
    two = pod("two", "10.0.0.2", labels="{app: b}").replace("spec: {", f"spec: {{{ports % 9090}, ")
    w = world(
        one,
        two,
        cnp(
            f"{ALL}ingress: [{{toPorts: [{{ports: [{{port: WEB, protocol: TCP}}]}}]}}],"
            " egress: [{toEndpoints: [{}], toPorts: [{ports: [{port: web, protocol: TCP}]}]}]}"
        ),
    )
    identity = {name: of(w, name).identity for name in ("one", "two")}
    for name, port in (("one", 8080), ("two", 9090)):
        (rule,) = rules(of(w, name).ingress)
        assert rule.ports == (PortRange("TCP", port, port),)
        assert {(rule.ports, rule.peers) for rule in of(w, name).egress.rules} == {
            ((PortRange("TCP", 8080, 8080),), frozenset({identity["one"]})),
            ((PortRange("TCP", 9090, 9090),), frozenset({identity["two"]})),
        }


def test_a_container_that_runs_beside_the_others_has_named_ports_too() -> None:
    """An init container has with restartPolicy: Always, and no other one."""
    init = "initContainers: [{name: i, %s ports: [{name: web, containerPort: 8080}]}]"
    deny = f"{ALL}ingressDeny: [{{toPorts: [{{ports: [{{port: web, protocol: TCP}}]}}]}}]}}"
    for policy, ports in (
        ("restartPolicy: Always,", {(PortRange("TCP", 8080, 8080),)}),
        ("", set()),
    ):
        made = pod("p", "10.0.0.1").replace("spec: {", f"spec: {{{init % policy}, ")
        found = rules(of(world(made, cnp(deny))).ingress)
        assert {rule.ports for rule in found if rule.deny} == ports


def test_a_name_that_pods_with_the_same_labels_have_for_different_ports() -> None:
    """It is allowed where all have it, and denied where any has."""

    def peer(name: str, address: str, port: int) -> str:
        ports = f"containers: [{{name: c, ports: [{{name: web, containerPort: {port}}}]}}]"
        return pod(name, address, labels="{app: b}").replace("spec: {", f"spec: {{{ports}, ")

    group = "{toEndpoints: [{}], toPorts: [{ports: [{port: web, protocol: TCP}]}]}"
    one, two = peer("one", "10.0.0.2", 8080), peer("two", "10.0.0.3", 9090)
    w = world(POD, one, cnp(f"{ALL}egress: [{group}], egressDeny: [{group}]}}"))

    def said() -> dict[bool, set[int]]:
        rules = of(w).egress.rules
        return {rule.deny: {port.first for port in rule.ports} for rule in rules}

    assert said() == {False: {8080}, True: {8080}}
    w.apply(two)
    assert said() == {True: {8080, 9090}}
    w.apply(peer("two", "10.0.0.3", 8080))
    assert said() == {False: {8080}, True: {8080}}
    w.apply(peer("two", "10.0.0.3", 8080).replace("name: web", "name: other"))
    assert said() == {True: {8080}}


def test_the_api_server_has_identities_of_its_own_also_on_a_node() -> None:
    addresses = "status: {{addresses: [{{type: InternalIP, address: {1}}}]}}"
    node = f"kind: Node\nmetadata: {{{{name: {{0}}}}}}\n{addresses}"
    w = world(
        POD,
        node.format("n1", "192.0.2.1"),
        node.format("n2", "192.0.2.2"),
        piece("kubernetes", "192.0.2.2 198.51.100.1", "{name: https, port: 6443}"),
        cnp(
            f"{ALL}egress: [{{toEntities: [kube-apiserver]}}, {{toEntities: [remote-node]}},"
            " {toEntities: [world]}, {toCIDR: [192.0.2.0/24]}, {toCIDR: [192.0.2.1/32]}]}"
        ),
    )
    at = {key.removeprefix("cidr/"): s.identity for key, s in w.of("cidr").items()}
    # A node's own address has the node's identity, unless the API server is there.
    assert at.keys() == {"192.0.2.2/32", "198.51.100.1/32", "192.0.2.0/24"}
    api, remote, outside, cidr, _ = (rule.peers or frozenset() for rule in of(w).egress.rules)
    assert api == {at["192.0.2.2/32"], at["198.51.100.1/32"], Reserved.KUBE_APISERVER}
    assert remote == {Reserved.REMOTE_NODE, at["192.0.2.2/32"]}
    assert {Reserved.WORLD, at["198.51.100.1/32"], at["192.0.2.0/24"]} <= outside
    assert at["192.0.2.2/32"] not in outside | cidr


def test_services_are_their_endpoints_pods_or_not() -> None:
    w = world(
        POD,
        pod("back", "10.0.0.2", labels="{app: b}", node="n2"),
        service("svc", "{port: 80}").replace("name: svc,", "name: svc, labels: {external: 'yes'},"),
        piece("svc", "10.0.0.2 192.0.2.9"),
        cnp(
            "{endpointSelector: {matchLabels: {app: a}}, egress: ["
            "{toServices: [{k8sService: {serviceName: svc, namespace: default}}]},"
            "{toServices: [{k8sServiceSelector: {selector: {matchLabels: {external: 'yes'}}}}]}]}"
        ),
    )
    expected = {
        w.sections["workload/default/back"].identity,  # type: ignore[union-attr]
        w.sections["cidr/192.0.2.9/32"].identity,  # type: ignore[union-attr]
    }
    assert [rule.peers for rule in of(w).egress.rules] == [expected, expected]
    w.delete("EndpointSlice", "svc-ipv4")
    assert [rule.peers for rule in of(w).egress.rules] == [frozenset(), frozenset()]
    assert not w.of("cidr")


def test_who_is_in_a_range_is_told_apart_where_policies_about_pods_here_name_it() -> None:
    of_b = "endpointSelector: {matchLabels: {app: b}}"
    w = world(
        POD,
        pod("there", "10.0.0.2", labels="{app: b}", node="n2"),
        cnp(f"{{{of_b}, egress: [{{toCIDR: [192.0.2.0/24]}}]}}", "of-b"),
        cnp("{endpointSelector: {matchLabels: {app: a}}, egress: [{toEntities: [world]}]}"),
    )

    def section() -> CidrSection:
        [found] = w.of("cidr").values()
        assert isinstance(found, CidrSection)
        return found

    assert not section().here
    assert [rule.peers for rule in of(w).egress.rules] == [{Reserved.WORLD}]
    w.apply(pod("here", "10.0.0.3", labels="{app: b}"))
    assert section().here
    number = section().identity
    assert [rule.peers for rule in of(w).egress.rules] == [{Reserved.WORLD, number}]
    assert [rule.peers for rule in of(w, "here").egress.rules] == [{number}]
    # The data plane has no room for it: its own policy is not Programmed, the other one is.
    w.refuse("cidr/192.0.2.0/24", "no room")
    assert why(w, name="of-b", type="Programmed") == (
        "the data plane refused cidr/192.0.2.0/24: no room"
    )
    assert why(w, type="Programmed") == ""
    w.delete("Pod", "here")
    assert not section().here


def test_nobody_gets_the_identity_of_another_by_ranges_and_labels_with_one_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who writes policies and pods can search for such; there is room to tell 128 apart."""
    monkeypatch.setattr(cidr, "number", lambda _: FIRST_CIDR | 7)
    monkeypatch.setattr(LabelSet, "number", 7)
    many = cnp(
        {"endpointSelector": {}, "egress": [{"toCIDR": [f"10.0.{i}.0/24" for i in range(130)]}]}
    )
    spec = "{endpointSelector: {}, ingress: [{fromCIDRSet: [{cidr: %s, except: [%s]}]}]}"
    others = (
        cnp(spec % ("1.0.0.0/8", "1.1.0.0/16"), "first"),
        cnp(spec % ("96.0.0.0/3", "99.0.0.0/8"), "last"),
    )
    pods = [pod(f"q{i:03}", f"10.1.0.{i}", labels=f"{{n: '{i}'}}") for i in range(130)]
    outcome = ControlPlane(MESH).apply(objects(join(*pods, many, *others)))
    found = [*outcome.put.values()]
    identities = [one.identity for one in found if isinstance(one, CidrSection | WorkloadSection)]
    assert len(set(identities)) == len(identities) == 128 + 128
    assert {table for table, _ in outcome.failures} >= {"range_identities", "identities"}
    section = next(one for one in found if isinstance(one, PolicySection) and one.pod)
    denied = {rule.source.split()[1] for rule in section.ingress.rules if rule.deny}
    assert denied == {"default/p", "default/last"}


def test_a_range_of_mapped_addresses_is_one_of_ipv4() -> None:
    """The kernel knows IPv4 by these: two spellings would have one place."""
    denied = cnp(f"{ALL}egressDeny: [{{toCIDR: [10.7.0.0/16]}}]}}")
    named = "{toCIDR: ['::ffff:10.7.0.2/128']}, {toCIDR: ['::ffff:10.7.0.0/112']}"
    w = world(POD, denied, cnp(f"{ALL}egress: [{named}]}}", "q"))
    assert w.of("cidr").keys() == {"cidr/10.7.0.0/16", "cidr/10.7.0.2/32"}
    one = w.sections["cidr/10.7.0.2/32"]
    assert isinstance(one, CidrSection)
    (deny,) = (rule for rule in of(w).egress.rules if rule.deny)
    assert one.identity in (deny.peers or ())
    # Shorter ones are of IPv6, as they are to the kernel.
    w = world(POD, cnp(f"{ALL}egress: [{{toCIDR: ['::ffff:0:0/90']}}]}}"))
    assert w.of("cidr").keys() == {"cidr/::ffc0:0:0/90"}


def test_who_is_in_a_range_of_pods_and_not_known_is_a_new_pod() -> None:
    """Whatever range a policy names around it, or the very same."""
    node = "kind: Node\nmetadata: {name: n2}\nspec: {podCIDRs: [10.244.1.0/24, nonsense]}"
    rules = "{toCIDR: [10.0.0.0/8]}, {toCIDR: [10.244.1.0/24]}, {toEntities: [init]}"
    w = world(POD, node, cnp(f"{ALL}egress: [{rules}]}}"))
    at = {key.removeprefix("cidr/"): s.identity for key, s in w.of("cidr").items()}  # type: ignore[union-attr]
    assert at.keys() == {"10.0.0.0/8", "10.244.1.0/24"}
    assert at["10.244.1.0/24"] == Reserved.INIT
    around, same, new = (rule.peers or frozenset() for rule in of(w).egress.rules)
    assert at["10.0.0.0/8"] in around
    assert Reserved.INIT not in around | same
    assert new == {Reserved.INIT}
    w.delete("Node", "n2", "")
    [inner] = [s for key, s in w.of("cidr").items() if key == "cidr/10.244.1.0/24"]
    assert inner.identity in same  # type: ignore[union-attr]


def test_audit_of_a_policy_a_namespace_and_all() -> None:
    audited = "{weft.dev/policy-audit: 'true'}"
    rule = f"{ALL}ingress: [{{fromEntities: [world]}}]}}"
    section = of(world(POD, cnp(rule, annotations=audited)))
    assert (section.ingress.default_deny, section.ingress.audit) == (True, True)
    assert [one.audit for one in rules(section.ingress)] == [True]
    # One that is enforced denies by default, and is all that allows.
    section = of(world(POD, cnp(rule, annotations=audited), cnp(rule, "q")))
    assert not section.ingress.audit
    assert [one.audit for one in rules(section.ingress)] == [True, False]
    namespace = f"kind: Namespace\nmetadata: {{name: default, annotations: {audited}}}"
    for w in (
        world(POD, cnp(rule), namespace),
        world(POD, cnp(rule), options=Options(**{**OPTIONS, "policy_audit": True})),
    ):
        assert of(w).ingress.audit
        assert [one.audit for one in rules(of(w).ingress)] == [True]


OPTIONS: dict[str, Any] = {"node": "n1", "mesh_addresses": ("127.0.0.1",)}


def test_an_audit_annotation_that_is_none_enforces() -> None:
    w = world(POD, cnp(f"{ALL}ingress: [{{}}]}}", annotations="{weft.dev/policy-audit: maybe}"))
    assert not of(w).ingress.audit


def test_without_a_mesh_nothing_is_called_programmed() -> None:
    w = world(cnp(f"{ALL}ingress: [{{}}]}}"), options=Options(advertise=("192.0.2.1",)))
    assert "no policy is enforced" in why(w, type="Programmed")


def test_a_section_that_the_data_plane_refuses_shows_at_its_policies() -> None:
    w = world(POD, pod("q", "10.0.0.2", labels="{app: q}"), cnp(f"{ALL}ingress: [{{}}]}}"),
              cnp("{endpointSelector: {matchLabels: {app: q}}, ingress: [{}]}", "q"))  # fmt: skip
    w.refuse("policy/default/p", "too large")
    assert "policy/default/p: too large" in why(w, type="Programmed")
    assert why(w, name="q", type="Programmed") == ""
    w.refuse("policy/default/p", None)
    assert why(w, type="Programmed") == ""


# --- requests ------------------------------------------------------------------------------------


def test_ports_about_whose_requests_policies_have_rules_go_to_the_proxy() -> None:
    w = world(
        POD,
        pod("client", "10.0.0.2", labels="{app: c}"),
        service("web", "{port: 80, targetPort: 8080}"),
        piece("web", "10.0.0.1", "{port: 8080}"),
    )
    entries = {key: s.http for key, s in w.of("entry").items()}
    assert entries == {"entry/10.0.0.1|8080/TCP": False, "entry/10.96.0.1|80/TCP": False}
    rule = HTTP.replace("'80'", "'8080'")
    w.apply(cnp(f"{{endpointSelector: {{matchLabels: {{app: a}}}}, ingress: [{{{rule}}}]}}"))
    entries = {key: s.http for key, s in w.of("entry").items()}
    assert entries == {"entry/10.0.0.1|8080/TCP": True, "entry/10.96.0.1|80/TCP": True}
    assert "service/default/web/80" in w.sections
    audited = "{weft.dev/policy-audit: 'true'}"
    w.apply(cnp(f"{{endpointSelector: {{}}, ingress: [{{{rule}}}]}}", annotations=audited))
    assert not any(s.http for s in w.of("entry").values())
    w.apply(cnp(f"{{endpointSelector: {{matchLabels: {{app: a}}}}, ingress: [{{{rule}}}]}}"))
    w.apply(f"kind: Namespace\nmetadata: {{name: default, annotations: {audited}}}")
    assert not any(s.http for s in w.of("entry").values())
    w.apply("kind: Namespace\nmetadata: {name: default}")
    assert any(s.http for s in w.of("entry").values())
    # For those of other nodes their own nodes judge; but what a pod of this node may ask is here.
    w.apply(pod(node="n2"))
    assert not any(s.http for s in w.of("entry").values())
    w.apply(cnp(f"{{endpointSelector: {{matchLabels: {{app: c}}}}, egress: [{{{rule}}}]}}", "q"))
    assert all(s.http for s in w.of("entry").values() if s.source != "Pod/default/client")
