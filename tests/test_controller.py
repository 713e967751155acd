"""The controller against an API server: what it writes, when, and what it leaves alone."""

import asyncio

import pytest
import yaml
from controller_world import NAMESPACE, controller_world
from kube_world import CRDS, GROUP, WAIT_S, gateway, gateway_class, needs_crds, route

from mesh.controller.balancers import gateway_label
from mesh.sources.kubernetes_client import Backoff

pytestmark = needs_crds


@pytest.fixture
async def world(tmp_path):
    async with controller_world(tmp_path) as found:
        yield found


async def test_statuses_once_the_nodes_have_it_in_force(world):
    for obj in (gateway_class(), gateway(), route("r")):
        world.server.create(obj)
    world.start()
    # Nobody serves yet, so nothing is said.
    world.report("a", ready=False)
    lease = "coordination.k8s.io/leases"
    await world.until(lambda: world.server.get(lease, "weft-controller", NAMESPACE))
    assert world.conditions(name="gw").get("Accepted", "Unknown") == "Unknown"
    world.report("a", ports={"0.0.0.0:80": ""})
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    await world.until(lambda: world.conditions("httproutes", "r")["Accepted"] == "True")
    status = world.status("gateways", "gw")
    assert status["addresses"] == [{"type": "IPAddress", "value": "192.0.2.1"}]
    assert status["listeners"][0]["attachedRoutes"] == 1
    await world.until(lambda: world.conditions("gatewayclasses", "weft", "")["Accepted"] == "True")


async def test_programmed_waits_for_every_node_that_serves(world, monkeypatch, caplog):
    monkeypatch.setattr("mesh.controller.controller._LONG_S", 0.05)
    for obj in (gateway_class(), gateway()):
        world.server.create(obj)
    world.report("a", ports={"0.0.0.0:80": ""})
    world.report("b", ports={"0.0.0.0:80": ""}, versions={"Gateway": 1, "GatewayClass": 1})
    controller, _ = world.start()
    await world.until(lambda: len(controller.nodes.ready()) == 2)
    assert not world.status("gateways", "gw").get("listeners")
    async with asyncio.timeout(WAIT_S):
        while "for node b (Gateway, GatewayClass, Namespace)" not in caplog.text:
            await asyncio.sleep(0.01)
    # A node that goes is waited for no more.
    world.report("b", ready=False)
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    # One that comes and cannot bind the port says so for all.
    world.report("b", ports={"0.0.0.0:80": "address in use"})
    await world.until(lambda: world.conditions()["Programmed"] == "False")
    listener = world.status("gateways", "gw")["listeners"][0]
    message = next(one["message"] for one in listener["conditions"] if one["type"] == "Programmed")
    assert "node b: address in use" in message


async def test_other_controllers_entries_and_classes_are_left_alone(world):
    theirs = gateway_class("other", "example.com/other")
    for obj in (gateway_class(), theirs, gateway(), gateway("not-ours", "other")):
        world.server.create(obj)
    obj = route("r")
    obj["spec"]["parentRefs"] = [{"name": "gw"}, {"name": "not-ours"}]
    world.server.create(obj)
    # Of ours much would be said.
    for number in range(1000):
        their = route(f"theirs-{number}")
        their["spec"]["parentRefs"] = [{"name": "not-ours", "sectionName": "none"}]
        their["spec"]["rules"] = [{"backendRefs": [{"name": "nothing", "port": 80}]}]
        world.server.create(their)
    entry = {
        "parentRef": {"group": GROUP, "kind": "Gateway", "name": "not-ours"},
        "controllerName": "example.com/other",
        "conditions": [
            {
                "type": "Accepted",
                "status": "True",
                "reason": "Accepted",
                "message": "theirs",
                "lastTransitionTime": "2020-01-01T00:00:00Z",
            }
        ],
    }
    world.server.change(obj, {"status": {"parents": [entry]}}, "status")
    world.report(ports={"0.0.0.0:80": ""})
    controller, _ = world.start()
    await world.until(lambda: world.conditions("httproutes", "r"))
    assert world.status("httproutes", "r")["parents"][0] == entry
    # The other controller writes again and again, each time on what it has read.
    for number in range(10):
        parents = [dict(one) for one in world.status("httproutes", "r")["parents"]]
        parents[0]["conditions"] = [{**entry["conditions"][0], "message": f"theirs {number}"}]
        world.server.change(obj, {"status": {"parents": parents}}, "status")
        world.server.change(obj, {"metadata": {"labels": {"n": str(number)}}})
        spec = {"rules": [{"matches": [{"path": {"type": "Exact", "value": f"/{number}"}}]}]}
        generation = world.server.change(obj, {"spec": spec})["metadata"]["generation"]

        def caught_up(generation=generation):
            ours = world.status("httproutes", "r")["parents"][1]
            return ours["conditions"][0]["observedGeneration"] == generation

        await world.until(caught_up)
        parents = world.status("httproutes", "r")["parents"]
        assert parents[0]["conditions"][0]["message"] == f"theirs {number}"
        assert len(parents) == 2
    assert not world.status("gateways", "not-ours").get("listeners")
    assert controller.writer.writes < 40
    # Neither read one by one, nor written, nor told of.
    asked = {part for _, path in world.server.requests for part in path.split("?")[0].split("/")}
    assert {"gw", "r"} <= asked
    assert not {one for one in asked if one.startswith(("theirs-", "not-ours", "other"))}
    store = world.server.store
    told = {
        event["involvedObject"]["name"] for _, event in store.list("/events", None, store.revision)
    }
    assert told <= {"gw", "r", "weft"}


async def test_an_unchanged_status_is_not_written_again(world):
    for obj in (gateway_class(), gateway(), route("r")):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    _, task = world.start()
    await world.until(lambda: world.conditions("httproutes", "r"))
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    await world.until(lambda: world.conditions("gatewayclasses", "weft", "")["Accepted"] == "True")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    before = {
        (plural, name): world.server.get(f"{GROUP}/{plural}", name, namespace)
        for plural, name, namespace in (
            ("gateways", "gw", "default"),
            ("httproutes", "r", "default"),
            ("gatewayclasses", "weft", ""),
        )
    }
    assert all(before.values())
    second, _ = world.start("two")
    # The next change is written, so everything before it has been looked at.
    world.server.create(route("s"))
    await world.until(lambda: world.conditions("httproutes", "s"))
    for (plural, name), obj in before.items():
        namespace = obj["metadata"].get("namespace", "")
        found = world.server.get(f"{GROUP}/{plural}", name, namespace)
        if plural != "gateways":
            assert found == obj
    assert second.writer.writes <= 3


async def test_what_the_clusters_gateway_api_does_not_have_is_left_out(world, caplog):
    """As of Gateway API v1.4, whose Gateways count no ListenerSets: a server refuses the whole
    status for one field that it has not."""
    crd = yaml.safe_load((CRDS / f"{GROUP}_gateways.yaml").read_text())
    for version in crd["spec"]["versions"]:
        status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
        del status["attachedListenerSets"]
        status["listeners"]["items"]["properties"]["conditions"]["items"]["properties"].pop(
            "observedGeneration"
        )
    world.server.change(crd, {"spec": crd["spec"]})
    caplog.set_level("INFO", "weft.controller")
    for obj in (gateway_class(), gateway(), gateway("other", port=81)):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": "", "0.0.0.0:81": ""})
    controller, _ = world.start()
    for name in ("gw", "other"):
        await world.until(lambda name=name: world.conditions(name=name)["Programmed"] == "True")
        status = world.status("gateways", name)
        assert "attachedListenerSets" not in status
        assert "observedGeneration" not in status["listeners"][0]["conditions"][0]
    assert sum("attachedListenerSets: left out" in one for one in caplog.messages) == 1
    # And it is not tried anew.
    writes = controller.writer.writes
    world.server.change(gateway(), {"metadata": {"labels": {"a": "b"}}})
    world.server.create(route("last"))
    await world.until(lambda: world.conditions("httproutes", "last"))
    assert world.conditions()["Programmed"] == "True"
    assert controller.writer.writes <= writes + 2


async def test_entries_of_parents_that_are_ours_no_more_go(world):
    for obj in (gateway_class(), gateway(), route("r")):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    _, task = world.start()
    await world.until(lambda: world.conditions("httproutes", "r"))
    world.server.change(route("r"), {"spec": {"parentRefs": [{"name": "elsewhere"}]}})
    await world.until(lambda: world.status("httproutes", "r")["parents"] == [])
    world.server.change(route("r"), {"spec": {"parentRefs": [{"name": "gw"}]}})
    await world.until(lambda: world.conditions("httproutes", "r"))
    # While no controller is there.
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    world.server.change(route("r"), {"spec": {"parentRefs": [{"name": "elsewhere"}]}})
    world.start("two")
    await world.until(lambda: world.status("httproutes", "r")["parents"] == [])


async def test_the_next_controller_takes_over_at_once(world):
    world.server.create(gateway_class())
    world.report()
    _, first = world.start("one")
    lease = "coordination.k8s.io/leases"

    def holder():
        return world.server.get(lease, "weft-controller", NAMESPACE)["spec"]["holderIdentity"]

    await world.until(lambda: holder() == "one")
    second, _ = world.start("two")
    second.election._retry_s = 0.02
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert holder() in ("", "two")
    await world.until(lambda: holder() == "two")
    world.server.create(gateway())
    world.report(ports={"0.0.0.0:80": ""})
    await world.until(lambda: world.conditions()["Programmed"] == "True")


async def test_addresses_from_a_pool_static_ones_and_unusable_ones(world):
    our_class = gateway_class()
    our_class["metadata"]["annotations"] = {"weft.dev/address-pool": "203.0.113.0/31"}
    static, nowhere = gateway("static"), gateway("nowhere")
    static["spec"]["addresses"] = [{"type": "IPAddress", "value": "203.0.113.0"}]
    nowhere["spec"]["addresses"] = [{"type": "IPAddress", "value": "198.51.100.1"}]
    # The pool's other address, which one of the nodes has, and not even that.
    for obj in (our_class, gateway(), static, nowhere, gateway("late")):
        world.server.create(obj)
    lacks = "Cannot assign requested address"
    ports = {"203.0.113.0:80": "", "203.0.113.1:80": "", "198.51.100.1:80": lacks}
    world.report("a", ports=ports)
    world.report("b", ports=dict.fromkeys(ports, lacks))
    world.start()

    def address(name):
        return [one["value"] for one in world.status("gateways", name)["addresses"]]

    await world.until(lambda: world.conditions(name="static")["Programmed"] == "True")
    assert address("static") == ["203.0.113.0"]
    (given,) = await world.until(
        lambda: [n for n in ("gw", "late") if world.conditions(name=n)["Programmed"] == "True"]
    )
    assert address(given) == ["203.0.113.1"]
    left = {"gw": "late", "late": "gw"}[given]

    def why(name):
        conditions = world.status("gateways", name)["conditions"]
        return next(
            (one["reason"], one["message"]) for one in conditions if one["type"] == "Programmed"
        )

    await world.until(lambda: why(left)[0] == "AddressNotAssigned")
    await world.until(lambda: why("nowhere")[0] == "AddressNotUsable")
    assert "node a: Cannot assign requested address" in why("nowhere")[1]
    await world.until(lambda: world.events("nowhere")["Warning", "AddressNotUsable"])


async def test_a_gateway_gets_a_load_balancer_and_shows_its_address(world):
    named = gateway("named", port=8080)
    named["spec"]["addresses"] = [{"value": "192.0.2.9"}]
    labelled = gateway()
    labelled["spec"]["allowedListeners"] = {"namespaces": {"from": "Same"}}
    labelled["spec"]["infrastructure"] = {"labels": {"team": "shop"}, "annotations": {"a": "b"}}
    for obj in (gateway_class(), labelled, named):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": "", "192.0.2.9:8080": ""}, addresses=("10.0.0.1", "fd00::1"))
    world.start(load_balancer=True)

    def service():
        return world.server.get("/services", "weft-gw")

    await world.until(service)
    await world.until(lambda: world.conditions()["Programmed"] == "False")
    made = service()
    assert made["spec"]["type"] == "LoadBalancer"
    assert [port["port"] for port in made["spec"]["ports"]] == [80]
    assert made["metadata"]["labels"]["team"] == "shop"
    assert made["metadata"]["annotations"] == {"a": "b"}
    await world.until(lambda: world.server.get("discovery.k8s.io/endpointslices", "weft-gw-ipv6"))
    slice_ = world.server.get("discovery.k8s.io/endpointslices", "weft-gw-ipv4")
    assert [one["addresses"] for one in slice_["endpoints"]] == [["10.0.0.1"]]
    assert slice_["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] == "weft.dev"
    # The cluster gives it an address.
    status = {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}}}
    world.server.change(made, status, "status")
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    assert world.status("gateways", "gw")["addresses"] == [
        {"type": "IPAddress", "value": "203.0.113.7"}
    ]
    # A node more.
    world.report("b", ports={"0.0.0.0:80": "", "192.0.2.9:8080": ""}, addresses=("10.0.0.2",))

    def endpoints():
        found = world.server.get("discovery.k8s.io/endpointslices", "weft-gw-ipv4")
        return [one["addresses"][0] for one in found["endpoints"]]

    await world.until(lambda: endpoints() == ["10.0.0.1", "10.0.0.2"])
    # A ListenerSet brings a port of its own.
    more = {
        "apiVersion": f"{GROUP}/v1",
        "kind": "ListenerSet",
        "metadata": {"name": "more", "namespace": "default"},
        "spec": {
            "parentRef": {"name": "gw"},
            "listeners": [{"name": "more", "port": 8081, "protocol": "HTTP"}],
        },
    }
    world.server.create(more)
    await world.until(lambda: [p["port"] for p in service()["spec"]["ports"]] == [80, 8081])
    # Mistakes that pass do not cost the Gateway its address: the Service stays.
    uid = service()["metadata"]["uid"]
    world.server.create(gateway_class("more"))
    reference = {"group": "example.com", "kind": "Config", "name": "none"}
    for wrong in (
        {"listeners": [{"name": "http", "port": 80, "protocol": "example.com/other"}]},
        {"infrastructure": {**labelled["spec"]["infrastructure"], "parametersRef": reference}},
    ):
        world.server.change(gateway(), {"spec": wrong})
        await world.until(lambda: world.conditions()["Programmed"] == "False")
        await _looked_at(world)
        assert service()["metadata"]["uid"] == uid
        world.server.change(gateway(), {"spec": {"infrastructure": None}})
        world.server.change(gateway(), {"spec": labelled["spec"]})
        await world.until(lambda: world.conditions()["Programmed"] == "True")
    world.server.delete(gateway_class())
    await _looked_at(world)
    assert service()["metadata"]["uid"] == uid
    world.server.create(gateway_class())
    # What somebody changes or deletes of it is made good.
    world.server.change(slice_, {"endpoints": []})
    await world.until(lambda: endpoints() == ["10.0.0.1", "10.0.0.2"])
    world.server.delete(slice_)
    await world.until(lambda: endpoints() == ["10.0.0.1", "10.0.0.2"])
    world.server.change(made, {"spec": {"type": "ClusterIP"}})
    await world.until(lambda: service()["spec"]["type"] == "LoadBalancer")
    # Without nodes of IPv6 there is nothing there.
    world.report(ports={"0.0.0.0:80": "", "192.0.2.9:8080": ""}, addresses=("10.0.0.1",))
    ipv6 = "weft-gw-ipv6"
    await world.until(
        lambda: not world.server.get("discovery.k8s.io/endpointslices", ipv6)["endpoints"]
    )
    # Another controller's, it is no more Weft's to keep; then again.
    world.server.change(gateway(), {"spec": {"gatewayClassName": "other"}})
    world.server.create(gateway_class("other", "example.com/other"))
    await world.until(lambda: service() is None)
    world.server.change(gateway(), {"spec": {"gatewayClassName": "weft"}})
    made = await world.until(service)
    world.server.change(made, status, "status")
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    # Deleted by somebody, it is made again; with its Gateway it goes.
    world.server.delete(made)
    await world.until(service)
    await world.until(lambda: world.conditions()["Programmed"] == "False")
    assert world.server.get("/services", "weft-named") is None
    world.server.delete(gateway())
    assert service() is None


async def _looked_at(world):
    """Until a Gateway that comes now has its Service."""
    later = gateway("later", "more", port=82)
    world.server.create(later)
    await world.until(lambda: world.server.get("/services", "weft-later"))
    world.server.delete(later)


def test_names_of_gateways_as_values_of_labels():
    """At most 63 characters, the last a letter or digit ("Labels and selectors", syntax)."""
    long = f"{'a' * 62}.{'b' * 100}"
    assert gateway_label("gw") == "gw"
    assert gateway_label(long) == "a" * 62


async def test_a_service_of_somebody_else_is_left_alone(world):
    theirs = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "weft-gw", "namespace": "default"},
        "spec": {"ports": [{"port": 9}]},
    }
    world.server.create(theirs)
    for obj in (gateway_class(), gateway()):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    world.start(load_balancer=True)
    await world.until(lambda: world.conditions()["Programmed"] == "False")
    programmed = world.status("gateways", "gw")["conditions"][1]
    assert "Service default/weft-gw is somebody else's" in programmed["message"]
    assert [one["port"] for one in world.server.get("/services", "weft-gw")["spec"]["ports"]] == [9]
    world.server.delete(theirs)
    await world.until(
        lambda: world.server.get("/services", "weft-gw")["spec"]["ports"][0]["port"] == 80
    )
    world.server.delete(gateway())
    assert world.server.get("/services", "weft-gw") is None


async def test_services_that_cannot_be_written_hold_up_no_other(world):
    world.server.faults.about, world.server.faults.codes = "/services/weft-bad", (500,)
    world.server.faults.refuse = 1.0
    names = [f"bad{number}" for number in range(8)]
    world.server.create(gateway_class())
    world.report(ports={f"0.0.0.0:{80 + number}": "" for number in range(9)})
    for number, name in enumerate(names):
        world.server.create(gateway(name, port=80 + number))
    world.start(load_balancer=True)
    async with asyncio.timeout(WAIT_S):
        while world.server.faults.refused < 4:
            await asyncio.sleep(0.01)
    world.server.create(gateway("good", port=88))
    await world.until(lambda: world.server.get("/services", "weft-good"))
    world.server.faults.refuse = 0.0
    await world.until(lambda: all(world.server.get("/services", f"weft-{n}") for n in names))


async def test_events_tell_what_does_not_hold_and_what_holds_again(world):
    for obj in (gateway_class(), gateway(), route("r")):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": "address in use"})
    world.start()

    found = await world.until(lambda: world.events("gw")["Warning", "PortUnavailable"])
    assert "node a: address in use" in found["message"]
    assert (
        found["involvedObject"]["uid"]
        == world.server.get(f"{GROUP}/gateways", "gw")["metadata"]["uid"]
    )
    world.report(ports={"0.0.0.0:80": ""})
    await world.until(lambda: world.events("gw")["Normal", "Programmed"])
    world.report(ports={"0.0.0.0:80": "address in use"})
    await world.until(lambda: world.events("gw")["Warning", "PortUnavailable"]["count"] == 2)
    backend = {"backendRefs": [{"name": "nothing", "port": 80}]}
    world.server.change(route("r"), {"spec": {"rules": [backend]}})
    found = await world.until(lambda: world.events("r")["Warning", "BackendNotFound"])
    assert found["message"].startswith("Gateway/gw: ResolvedRefs is False: ")


async def test_a_leader_that_is_killed_in_the_middle_of_writing(world):
    """It hands nothing back; the next one waits until the Lease is stale, by its own clock, and
    finishes what is unfinished. The clock in the Lease is an hour off."""
    for obj in (gateway_class(), gateway(), *(route(f"r{n}") for n in range(150))):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    first, task = world.start("one")
    first.election._lease_s, first.election._renew_s = 1.0, 0.7
    first.election._retry_s = 0.1
    await world.until(lambda: sum(1 for n in range(150) if _written(world, n)) > 20)
    first.election.leading = False
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not all(_written(world, n) for n in range(150))
    lease = world.server.get("coordination.k8s.io/leases", "weft-controller", NAMESPACE)
    assert lease["spec"]["holderIdentity"] == "one"
    world.server.change(lease, {"spec": {"renewTime": "2099-01-01T00:00:00.000000Z"}})
    second, _ = world.start("two")
    second.election._retry_s = 0.1
    await world.until(lambda: all(_written(world, n) for n in range(150)))
    assert all(len(world.status("httproutes", f"r{n}")["parents"]) == 1 for n in range(150))


def _written(world, number):
    return bool(world.status("httproutes", f"r{number}"))


async def test_two_at_once_and_one_writes(world):
    for obj in (gateway_class(), gateway(), route("r")):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    first, _ = world.start("one")
    await world.until(lambda: world.conditions("httproutes", "r"))
    second, _ = world.start("two")
    await world.until(lambda: second.writer.wanted and not second._held)
    world.server.change(route("r"), {"spec": {"hostnames": ["a.example"]}})

    def caught_up():
        (parent,) = world.status("httproutes", "r")["parents"]
        return parent["conditions"][0]["observedGeneration"] == 2

    await world.until(caught_up)
    assert first.election.leading
    assert not second.election.leading
    assert second.writer.writes == 0


async def test_one_object_at_a_time_and_many_at_once(world):
    """A write that takes long holds up no other object, and is the only one to its own."""
    world.server.faults.about, world.server.faults.delay_s = "/slow/status", 0.3
    for obj in (gateway_class(), gateway(), route("slow"), *(route(f"r{n}") for n in range(20))):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    world.start()
    path = f"/apis/{GROUP}/v1/namespaces/default/httproutes/slow/status"
    await world.until(lambda: all(_written(world, n) for n in range(20)))
    assert world.server.most_open[path] == 1
    for number in range(5):
        spec = {"hostnames": [f"h{number}.example"]}
        generation = world.server.change(route("slow"), {"spec": spec})["metadata"]["generation"]
        world.server.create(route(f"more{number}"))
        await world.until(lambda number=number: world.status("httproutes", f"more{number}"))

    def caught_up():
        (parent,) = world.status("httproutes", "slow")["parents"]
        return parent["conditions"][0]["observedGeneration"] == generation

    await world.until(caught_up)
    assert world.server.most_open[path] == 1
    assert sum(path in one for _, one in world.server.requests) < 6


async def test_more_to_say_than_a_condition_holds(world):
    """A status with a message that is too long would be refused as a whole."""
    obj = route("r")
    refs = [[{"name": f"{'n' * 245}-{r}-{b}", "port": 80} for b in range(16)] for r in range(16)]
    obj["spec"]["rules"] = [{"backendRefs": some} for some in refs]
    for one in (gateway_class(), gateway(), obj):
        world.server.create(one)
    world.report(ports={"0.0.0.0:80": ""})
    world.start()
    await world.until(lambda: world.conditions("httproutes", "r")["ResolvedRefs"] == "False")
    (parent,) = world.status("httproutes", "r")["parents"]
    assert max(len(one["message"]) for one in parent["conditions"]) == 32768


async def test_who_undoes_a_status_is_not_fought(world, monkeypatch):
    """Twice it is put right at once, then less and less often; what is new is said at once."""
    monkeypatch.setattr("mesh.controller.writer._UNDONE_S", 3600.0)
    for obj in (gateway_class(), gateway(), gateway("other", port=82)):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": "", "0.0.0.0:82": ""})
    controller, _ = world.start()
    await world.until(lambda: world.conditions()["Programmed"] == "True")

    def undo():
        obj = world.server.get(f"{GROUP}/gateways", "gw")
        for one in obj["status"]["conditions"]:
            one["status"] = "Unknown"
        world.server.change(obj, {"status": obj["status"]}, "status")

    undo()
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    undo()
    for number in range(3):
        # What comes later is seen later.
        obj = route(f"r{number}")
        obj["spec"]["parentRefs"] = [{"name": "other"}]
        world.server.create(obj)
        await world.until(lambda n=number: world.conditions("httproutes", f"r{n}"))
        world.server.change(gateway(), {"metadata": {"labels": {"n": str(number)}}})
    assert world.conditions()["Programmed"] == "Unknown"
    assert len(controller.writer._put_off) == 1
    world.server.change(gateway(), {"spec": gateway(port=81)["spec"]})
    world.report(ports={"0.0.0.0:81": "", "0.0.0.0:82": ""})
    await world.until(lambda: world.conditions()["Programmed"] == "True")


async def test_objects_that_cannot_be_written_hold_up_no_other(world):
    """As when a webhook that is asked about one kind does not answer."""
    world.server.faults.about, world.server.faults.codes = "/httproutes", (500,)
    for obj in (gateway_class(), *(route(f"r{n}") for n in range(20))):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    controller, _ = world.start()
    controller.writer._backoff = lambda: Backoff(3600, 3600)
    async with asyncio.timeout(WAIT_S):
        while not controller._synced:
            await asyncio.sleep(0.01)
    world.server.faults.refuse = 1.0
    world.server.create(gateway())
    async with asyncio.timeout(WAIT_S):
        while world.server.faults.refused < 8:
            await asyncio.sleep(0.01)
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    world.server.faults.refuse = 0.0
    await world.until(
        lambda: all(world.conditions("httproutes", f"r{n}")["Accepted"] for n in range(20))
    )


async def test_refused_writes_are_tried_again(world):
    world.server.faults.about = "/status"
    world.server.faults.refuse = 0.6
    for obj in (gateway_class(), gateway(), *(route(f"r{n}") for n in range(20))):
        world.server.create(obj)
    world.report(ports={"0.0.0.0:80": ""})
    world.start()
    await world.until(
        lambda: all(world.conditions("httproutes", f"r{n}")["Accepted"] for n in range(20))
    )
    assert world.server.faults.refused > 5
