"""Generated policies of all kinds over nine pods: what is in force decides as the plain model of
the documentation does (tests/policy_model.py), for every pair, protocol and port."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from policy_cases import OUTSIDE, PODS, WHAT, manifests, model, policies
from policy_model import Manifest, Outside

from gateway.control import Options
from l7proxy.credentials import Credentials
from l7proxy.peers import Caller, Peers
from l7proxy.policies import Asker, Policies
from mesh.model.nodeconfig import NodeSection, Settings, WorkloadSection
from mesh.model.policyconfig import CidrSection, PolicySection
from tests.gateway_world import World

MESH = Options(node="n1", mesh_addresses=("127.0.0.1", "::1"))


def in_force(world: World) -> Policies:
    """The proxy's side of what the control plane says."""
    peers = Peers(Credentials(), Settings())
    found = Policies(peers)
    for key, section in world.sections.items():
        match section:
            case WorkloadSection():
                peers.put_workload(key, section)
            case NodeSection():
                peers.put_node(key, section)
            case CidrSection() | PolicySection():
                found.put(key, section)
    return found


# What is required of peers by their labels is not required of addresses beside them.
MIXED = [
    {
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "b", "name": "p0"},
        "spec": {
            "podSelector": {},
            "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"namespaceSelector": {}}]}],
        },
    },
    {
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "p1"},
        "spec": {
            "endpointSelector": {},
            "egress": [{"toRequires": [{"matchLabels": {"app": "x"}}], "toEntities": ["none"]}],
        },
    },
]


@example(MIXED)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(policies())
def test_every_decision_is_the_models(found: list[Manifest]) -> None:
    world = World(MESH)
    world.apply(manifests(found))
    decided, meant = in_force(world), model(found)
    for source in (*PODS, *OUTSIDE):
        asker = (
            Asker((decided.identity(source.address),))
            if isinstance(source, Outside)
            else decided.asker(Caller(source.address))
        )
        for destination in (*PODS, *OUTSIDE):
            if isinstance(source, Outside) and isinstance(destination, Outside):
                continue
            if isinstance(source, Outside) and source.entity == "host":
                continue  # the filter asks nobody about it
            for protocol, port in WHAT:
                verdict = decided.connection(asker, destination.address, port, protocol)  # type: ignore[arg-type]
                assert verdict.allowed == meant.allowed(source, destination, protocol, port), (
                    source,
                    destination,
                    protocol,
                    port,
                    verdict,
                )
