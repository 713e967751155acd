"""Policies for the pods of tests/pod_world.py, in few words."""

from __future__ import annotations

from pod_world import LINK, NODE, A, B

from mesh.model.identity import Reserved
from mesh.model.nodeconfig import NodeSection, SvidSection, WorkloadSection
from mesh.model.policyconfig import Direction, PolicyRule, PolicySection, PortRange

VERSIONS = (4, 6)
ID = {"a": 300, "b": 301}
ADDRESSES = {"a": tuple(A.values()), "b": tuple(B.values())}
WORLD = frozenset({Reserved.WORLD})
NOTHING = Direction()
A_ONLY = frozenset({ID["a"]})
SPIFFE = {name: f"spiffe://cluster.local/ns/shop/sa/{name}" for name in ID}
# That the node holds their SVIDs, and until when, is all that the data path asks.
SVIDS = {f"svid/{one}": SvidSection(one, "", "", 1 << 32) for one in SPIFFE.values()}
KNOWN = {
    **{
        f"workload/shop/{name}": WorkloadSection(
            "shop",
            name,
            ADDRESSES[name],
            node="n1",
            local=True,
            identity=ID[name],
            spiffe_id=SPIFFE[name],
        )
        for name in ID
    },
    "node/n1": NodeSection("n1", (*NODE.values(), *LINK.values())),
}


def allow(peers: frozenset[int] | None = None, *ports: PortRange, **more: bool) -> PolicyRule:
    return PolicyRule("NetworkPolicy shop/x ingress[0]", peers, ports, **more)


def policy(
    name: str = "b", ingress: Direction = NOTHING, egress: Direction = NOTHING
) -> dict[str, object]:
    made = PolicySection("shop", name, ID[name], ADDRESSES[name], ingress, egress)
    return {f"policy/shop/{name}": made}


def only(*rules: PolicyRule) -> Direction:
    return Direction(default_deny=True, rules=rules)


def tcp(port: int, last: int = 0) -> PortRange:
    return PortRange("TCP", port, last or port)
