"""The controller while things go wrong: objects that take each other's names, servers that are slow
or do not know it any more, clocks, other versions of itself."""

import pytest
from controller_world import controller_world
from kube_world import CONTROLLER, GROUP, gateway, gateway_class, needs_crds, route

pytestmark = needs_crds

LEASES = "coordination.k8s.io/leases"


@pytest.fixture
async def world(tmp_path):
    async with controller_world(tmp_path) as found:
        for obj in (gateway_class(), gateway()):
            found.server.create(obj)
        found.report(ports={"0.0.0.0:80": ""})
        yield found


def ours(obj):
    parents = obj.get("status", {}).get("parents", ())
    return [one for one in parents if one["controllerName"] == CONTROLLER]


async def test_an_object_that_takes_anothers_name_never_gets_its_status(world):
    """Deleted and made again between two events; both are of generation 1."""
    there, missing = route("r"), route("r")
    for obj, name in ((there, "there"), (missing, "missing")):
        obj["spec"]["rules"][0]["backendRefs"] = [{"name": name, "port": 80}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "there", "namespace": "default"},
        "spec": {"ports": [{"port": 80}]},
    }
    world.server.create(service)
    written = world.server.store.watch(f"{GROUP}/httproutes")
    world.start()
    resolves = {}
    for number in range(12):
        obj = missing if number % 4 > 1 else there
        if number:
            # Nobody sees the deletion.
            world.server.faults.away = True
            world.server.cut_connections()
            world.server.delete(there)
        resolves[world.server.create(obj)["metadata"]["uid"]] = obj is there
        if number:
            world.server.store.compact()
            world.server.faults.away = False
        wanted = "True" if obj is there else "False"
        await world.until(
            lambda wanted=wanted: world.conditions("httproutes", "r").get("ResolvedRefs") == wanted
        )
    said = 0
    while not written.empty():
        obj = written.get_nowait().new
        for parent in ours(obj) if obj else ():
            (found,) = [c["status"] for c in parent["conditions"] if c["type"] == "ResolvedRefs"]
            assert found == str(resolves[obj["metadata"]["uid"]])
            said += 1
    assert said >= 12
