"""What policies cost: 1,000 of them over 5,000 pods, as one node of twenty sees them.

Time to compute everything, then one changed policy, one new pod with labels of its own and one that
goes; memory of the control plane; what the proxy and the kernel's map get. No traffic, no root.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from bpf import constants, rules
from gateway.control import ControlPlane, Options
from l7proxy.credentials import Credentials
from l7proxy.peers import Peers
from l7proxy.policies import Policies
from mesh.model.decode import Object, decode, key_of
from mesh.model.nodeconfig import NodeSection, Section, Settings, WorkloadSection
from mesh.model.policyconfig import CidrSection, PolicySection

PODS, POLICIES, NAMESPACES, NODES = 5_000, 1_000, 50, 20
_REPEATS = 50


class Row(NamedTuple):
    what: str
    value: str


def pod(number: int, **labels: str) -> Object:
    """Ten pods of each Deployment, spread over the nodes."""
    app, namespace = number // 10, number // 10 % NAMESPACES
    return decode(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"pod-{number}",
                "namespace": f"ns-{namespace}",
                "labels": {"app": f"app-{app}", "tier": "web" if app % 3 else "db", **labels},
            },
            "spec": {
                "nodeName": f"n{number % NODES}",
                "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}],
            },
            "status": {"podIP": f"10.{number // 65536}.{number // 256 % 256}.{number % 256}"},
        }
    )


def policy(number: int, port: int = 8080) -> Object:
    """Of every five: three NetworkPolicies, one of Cilium's with HTTP rules and ranges, and of
    every fifty one that is clusterwide."""
    app = number % (PODS // 10)
    namespace, other = app % NAMESPACES, (app + 7 * NAMESPACES) % (PODS // 10)
    subject = {"matchLabels": {"app": f"app-{app}"}}
    peer = {"matchLabels": {"app": f"app-{other}"}}
    metadata: dict[str, Any] = {"name": f"policy-{number}", "namespace": f"ns-{namespace}"}
    if number % 50 == 49:
        del metadata["namespace"]
        return decode(
            {
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumClusterwideNetworkPolicy",
                "metadata": metadata,
                "spec": {
                    "endpointSelector": {"matchLabels": {"tier": "db"}},
                    "ingressDeny": [{"fromEntities": ["world"]}],
                },
            }
        )
    if number % 5 >= 3:
        http = {"http": [{"method": "GET", "path": f"/v{number}/.*"}]}
        return decode(
            {
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumNetworkPolicy",
                "metadata": metadata,
                "spec": {
                    "endpointSelector": subject,
                    "ingress": [
                        {
                            "fromEndpoints": [peer],
                            "toPorts": [
                                {"ports": [{"port": str(port), "protocol": "TCP"}], "rules": http}
                            ],
                        },
                        {"fromCIDR": [f"192.0.{number % 256}.0/24"]},
                    ],
                },
            }
        )
    return decode(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": {
                "podSelector": subject,
                "ingress": [
                    {"from": [{"podSelector": peer}], "ports": [{"port": port}, {"port": "http"}]},
                    {"from": [{"namespaceSelector": {}, "podSelector": peer}]},
                ],
                "egress": [{"to": [{"podSelector": {}}]}, {"ports": [{"port": 53}]}],
            },
        }
    )


def measure() -> Iterator[Row]:
    """One row after the other, as they are known."""
    pods = [pod(number) for number in range(PODS)]
    policies = [policy(number) for number in range(POLICIES)]
    nodes = [
        decode(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": f"n{number}"},
                "status": {
                    "addresses": [{"type": "InternalIP", "address": f"172.18.0.{number + 1}"}]
                },
            }
        )
        for number in range(NODES)
    ]
    changes: dict[str, dict[Any, Any]] = {}
    for one in (*pods, *nodes):
        changes.setdefault(one.kind, {})[key_of(one)] = one
    plane = ControlPlane(Options(node="n0", mesh_addresses=("127.0.0.1",)))
    before = _resident_mib()
    sections: dict[str, Section] = dict(plane.apply(changes).put)
    without = _resident_mib()
    changes = {}
    for one in policies:
        changes.setdefault(one.kind, {})[key_of(one)] = one
    start = time.perf_counter()
    outcome = plane.apply(changes)
    yield Row("all policies, from nothing", f"{time.perf_counter() - start:.2f} s")
    sections |= outcome.put
    memory = f"{without - before:.0f} MiB for pods, {_resident_mib() - without:.0f} for policies"
    yield Row("memory of the control plane", memory)

    def change(what: Callable[[int], tuple[str, Any, Any]], name: str) -> Row:
        taken = []
        for number in range(_REPEATS):
            kind, key, new = what(number)
            gc.collect(0)
            start = time.perf_counter()
            found = plane.apply({kind: {key: new}})
            taken.append(1000 * (time.perf_counter() - start))
            assert not found.failures
        worst = max(taken)
        return Row(name, f"{statistics.median(taken):.2f} ms (the slowest {worst:.2f})")

    def other_policy(number: int) -> tuple[str, Any, Any]:
        # Those that select pods of this node, of each kind.
        changed = policy((number * 2) % POLICIES, port=9000 + number)
        return changed.kind, key_of(changed), changed

    def new_pod(number: int) -> tuple[str, Any, Any]:
        made = pod(PODS + number, version=f"v{number}")
        return made.kind, key_of(made), made

    def gone_pod(number: int) -> tuple[str, Any, Any]:
        made = pod(PODS + number)
        return made.kind, key_of(made), None

    yield change(other_policy, "one changed policy")
    yield change(new_pod, "one new pod with labels of its own")
    yield change(gone_pod, "one pod that goes")
    yield from _sizes(sections)


def _sizes(sections: dict[str, Section]) -> Iterator[Row]:
    own = [one for one in sections.values() if isinstance(one, PolicySection)]
    size = sum(len(msgspec.msgpack.encode(one)) for one in own)
    count = sum(len(side.rules) for one in own for side in (one.ingress, one.egress))
    yield Row("sections of this node's pods", f"{len(own)}, {count} rules, {size / 1024:.0f} KiB")
    # Pods with the same rules share a set of entries.
    sets = {(one.ingress, one.egress) for one in own}
    entries = sum(
        1
        for pair in sets
        for side, number in zip(pair, (constants.INGRESS, constants.EGRESS), strict=True)
        for _ in rules.entries(side, number)
    )
    yield Row("entries of the kernel's map", f"{entries} in {len(sets)} sets")
    peers = Peers(Credentials(), Settings())
    found = Policies(peers)
    before, start = _resident_mib(), time.perf_counter()
    for key, section in sections.items():
        match section:
            case WorkloadSection():
                peers.put_workload(key, section)
            case NodeSection():
                peers.put_node(key, section)
            case CidrSection() | PolicySection():
                found.put(key, section)
    taken = time.perf_counter() - start
    yield Row("a worker takes all of it", f"{taken:.2f} s, {_resident_mib() - before:.0f} MiB")


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1024**2


def run() -> None:
    print(f"{POLICIES:,} policies, {PODS:,} pods, {NAMESPACES} namespaces, one node of {NODES}:")
    for row in measure():
        print(f"  {row.what + ':':<38} {row.value}", flush=True)
