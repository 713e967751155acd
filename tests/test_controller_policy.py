"""Policies in a cluster: where it is said whether they are in force, and by Events where their kind
has no place for it."""

import pytest
from controller_world import controller_world
from kube_world import (
    CILIUM,
    cilium_crds,
    gateway_class,
    needs_cilium_crds,
    needs_crds,
    policy,
)

pytestmark = [needs_crds, needs_cilium_crds]


@pytest.fixture
async def world(tmp_path):
    async with controller_world(tmp_path) as found:
        yield found


def conditions(world, plural, name="p", namespace="default"):
    found = world.server.get(f"{CILIUM}/{plural}", name, namespace)
    return {one["type"]: one["status"] for one in found.get("status", {}).get("conditions", ())}


async def test_cilium_policies_show_conditions_beside_those_of_others(world):
    for crd in cilium_crds(conditions=True):
        world.server.create(crd)
    world.server.create(policy("CiliumNetworkPolicy"))
    world.server.create(policy("CiliumClusterwideNetworkPolicy", "c", fqdn=True))
    theirs = {"type": "Valid", "status": "True", "reason": "", "message": "theirs"}
    world.server.change(
        policy("CiliumNetworkPolicy"), {"status": {"conditions": [theirs]}}, "status"
    )
    world.report()
    world.start(mesh=True)
    wanted = {"Valid": "True", "Accepted": "True", "Programmed": "True"}
    await world.until(lambda: conditions(world, "ciliumnetworkpolicies") == wanted)
    wide = "ciliumclusterwidenetworkpolicies"
    await world.until(lambda: conditions(world, wide, "c", "")["Accepted"] == "False")
    found = await world.until(lambda: world.events("c")["Warning", "Unsupported"])
    assert "toFQDNs" in found["message"]
    assert found["metadata"]["namespace"] == "default"
    # A node that cannot have it in force says so for all.
    _pod_runs(world)
    world.report("b", refused={"policy/default/web": "too many rules"})
    await world.until(lambda: conditions(world, "ciliumnetworkpolicies")["Programmed"] == "False")
    await world.until(lambda: conditions(world, wide, "c", "")["Programmed"] == "False")
    # So does one that steers and filters nothing.
    world.report("b")
    await world.until(lambda: conditions(world, "ciliumnetworkpolicies") == wanted)
    world.report("b", mesh=False)
    await world.until(lambda: conditions(world, "ciliumnetworkpolicies")["Programmed"] == "False")
    (said,) = (
        one["message"]
        for one in world.server.get(f"{CILIUM}/ciliumnetworkpolicies", "p")["status"]["conditions"]
        if one["type"] == "Programmed"
    )
    assert "node b: there is no mesh on this node, so no policy is enforced" in said
    # What was still to be written of that is written before what comes after it.
    world.server.create(policy("CiliumNetworkPolicy", "next"))
    await world.until(lambda: conditions(world, "ciliumnetworkpolicies", "next"))
    written = _writes(world, "p")
    assert written
    world.server.change(policy("CiliumNetworkPolicy"), {"metadata": {"labels": {"a": "b"}}})
    world.server.create(policy("CiliumNetworkPolicy", "last"))
    await world.until(lambda: conditions(world, "ciliumnetworkpolicies", "last"))
    # What was right was not written again.
    assert _writes(world, "p") == written


async def test_where_there_is_no_place_for_conditions_events_tell(world):
    """NetworkPolicy has no status, Cilium's older definitions drop conditions."""
    for crd in cilium_crds(conditions=False):
        world.server.create(crd)
    world.server.create(policy("NetworkPolicy", "n"))
    world.server.create(policy("CiliumNetworkPolicy", fqdn=True))
    _pod_runs(world)
    world.report(refused={"policy/default/web": "too many rules"})
    world.start(mesh=True)
    found = await world.until(lambda: world.events("n")["Warning", "Refused"])
    assert "the data plane refused policy/default/web: node a: too many rules" in found["message"]
    assert found["involvedObject"]["kind"] == "NetworkPolicy"
    assert found["involvedObject"]["apiVersion"] == "networking.k8s.io/v1"
    await world.until(lambda: world.events("p")["Warning", "Unsupported"])
    world.report()
    await world.until(lambda: world.events("n")["Normal", "Programmed"])
    # Nothing is written that would be dropped, nor asked of an endpoint that is not there.
    asked = [path for method, path in world.server.requests if method == "PATCH"]
    assert not [path for path in asked if "/networkpolicies/" in path]
    written = _writes(world, "p")
    world.server.change(policy("CiliumNetworkPolicy"), {"metadata": {"labels": {"a": "b"}}})
    world.server.create(policy("CiliumNetworkPolicy", "last", fqdn=True))
    await world.until(lambda: world.events("last")["Warning", "Unsupported"])
    assert _writes(world, "p") == written
    assert not _writes(world, "last")


async def test_without_a_mesh_policies_are_somebody_elses(world):
    for crd in cilium_crds(conditions=True):
        world.server.create(crd)
    world.server.create(policy("CiliumNetworkPolicy", fqdn=True))
    world.server.create(policy("NetworkPolicy", "n"))
    world.report()
    world.server.create(gateway_class())
    world.start()
    await world.until(lambda: world.conditions("gatewayclasses", "weft", "")["Accepted"] == "True")
    assert not [path for _, path in world.server.requests if "policies" in path and CILIUM in path]
    assert not conditions(world, "ciliumnetworkpolicies")


def _writes(world, name):
    """How often the status of a policy was written, or was tried to be."""
    path = f"/ciliumnetworkpolicies/{name}/status"
    return sum(method == "PATCH" and path in asked for method, asked in world.server.requests)


def _pod_runs(world):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"nodeName": "b", "containers": [{"name": "c", "image": "i"}]},
    }
    world.server.create(pod)
    status = {"podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.9"}], "phase": "Running"}
    world.server.change(pod, {"status": status}, "status")
