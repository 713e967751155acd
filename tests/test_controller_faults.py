"""The controller while things go wrong: objects that take each other's names, servers that are slow
or do not know it any more, clocks, other versions of itself."""

import asyncio
import contextlib
import copy
import time

import msgspec
import pytest
from controller_world import NAMESPACE, controller_world
from kube_world import CONTROLLER, GROUP, WAIT_S, gateway, gateway_class, needs_crds, route

from mesh.controller.election import Election
from mesh.install import manifests
from mesh.model.decode import KINDS
from mesh.model.nodereport import ANNOTATION
from mesh.sources.kubernetes_client import APPLY, Client, ServerError
from tests.support.running import free_port

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


async def test_two_versions_one_after_the_other(world):
    """They say different things of the same objects. The one that leads is alone, what the other
    said is all gone after it, and nothing goes to and fro."""
    world.server.create(route("r"))
    old, first = world.start("old", advertise=("192.0.2.1", "192.0.2.2"))

    def said():
        status = world.status("gateways", "gw")
        types = {one["type"] for one in status["conditions"]}
        return [one["value"] for one in status["addresses"]], types

    await world.until(lambda: said()[0] == ["192.0.2.1", "192.0.2.2"])
    await world.until(lambda: world.conditions("httproutes", "r"))
    # The old one also had a condition that the new one does not know.
    obj = world.server.get(f"{GROUP}/gateways", "gw")
    extra = {**obj["status"]["conditions"][0], "type": "example.com/Former"}
    body = {
        "apiVersion": f"{GROUP}/v1",
        "kind": "Gateway",
        "metadata": {"name": "gw"},
        "status": {**obj["status"], "conditions": [*obj["status"]["conditions"], extra]},
    }
    client = old.writer._client
    path = f"/apis/{GROUP}/v1/namespaces/default/gateways/gw/status"
    query = {"fieldManager": "weft", "force": "true"}
    await client.request("PATCH", path, query, body, content_type=APPLY)
    assert "example.com/Former" in said()[1]
    new, _ = world.start("new", advertise=("192.0.2.3",))
    await world.until(lambda: new.writer.wanted and not new._held)
    generation = world.server.change(gateway(port=81), {"spec": {"listeners": LISTENERS}})
    world.report(ports={"0.0.0.0:80": "", "0.0.0.0:81": ""})
    number = generation["metadata"]["generation"]
    await world.until(
        lambda: world.status("gateways", "gw")["conditions"][0]["observedGeneration"] == number
    )
    # Both see that these are not what the new one would say; only the old one may speak.
    assert said()[0] == ["192.0.2.1", "192.0.2.2"]
    assert new.writer.writes == 0
    history = world.server.store.watch(f"{GROUP}/gateways")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    new.election._retry_s = 0.02
    await world.until(lambda: said()[0] == ["192.0.2.3"])
    await world.until(lambda: "example.com/Former" not in said()[1])
    world.server.create(route("last"))
    await world.until(lambda: world.conditions("httproutes", "last"))
    after = []
    while not history.empty():
        status = history.get_nowait().new["status"]
        after.append(tuple(one["value"] for one in status["addresses"]))
    assert set(after) == {("192.0.2.3",)}


LISTENERS = [
    {"name": "http", "port": 80, "protocol": "HTTP"},
    {"name": "more", "port": 81, "protocol": "HTTP"},
]


async def test_reports_of_other_versions(world, caplog):
    """Of a newer node what is understood counts; one that cannot be read at all is not a node."""
    lease = world.server.get(LEASES, "weft-node.a", NAMESPACE)
    report = msgspec.json.decode(lease["metadata"]["annotations"][ANNOTATION])
    newer = msgspec.json.encode({**report, "novel": [1], "node": "b"}).decode()
    broken = msgspec.json.encode({**report, "versions": "all"}).decode()
    for name, text in (("b", newer), ("c", broken)):
        metadata = {**lease["metadata"], "name": f"weft-node.{name}"}
        metadata["annotations"] = {ANNOTATION: text}
        for given in ("uid", "resourceVersion", "managedFields", "creationTimestamp"):
            metadata.pop(given, None)
        world.server.create({**lease, "metadata": metadata})
    controller, _ = world.start()
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    assert [one.node for one in controller.nodes.ready()] == ["a", "b"]
    assert "Lease weft-system/weft-node.c: its report cannot be read" in caplog.text


async def test_nodes_that_have_gone_are_waited_for_by_nobody(world):
    """Not even by a controller that starts, though their Leases are still there: who takes those
    away, garbage collection, is not quick, nor is a node's name its identity."""
    about = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}}
    node = world.server.create(about)
    gone = {"metadata": {"uid": "of-one-before"}}
    ports = {"0.0.0.0:80": ""}
    world.report("a", owner=node, ports=ports)
    world.report("b", owner=gone, versions={"Gateway": 1}, ports=ports)
    controller, _ = world.start()
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    assert [one.node for one in controller.nodes.ready()] == ["a"]
    # A Node that comes after its Lease counts from then on.
    later = world.server.create({**about, "metadata": {"name": "c"}})
    world.report("c", owner=later, ports={"0.0.0.0:80": "address in use"})
    await world.until(lambda: world.conditions()["Programmed"] == "False")
    # And none any more once it has gone.
    world.server.delete(later)
    await world.until(lambda: world.conditions()["Programmed"] == "True")


async def test_a_node_that_has_more_to_say_than_fits(world):
    """An API server refuses annotations of more than 256 KiB. While not all that is refused can be
    named, nothing is said to be in force."""
    everything = {kind: 10**9 for _, kind in KINDS}
    refused = {f"Route/{'n' * 60}/{number:0>253}": "ü" * 300 for number in range(2000)}
    ports = {f"[2001:db8::{number:x}]:80": "y" * 300 for number in range(600)}
    world.report("a", versions=everything, refused=refused, ports={**ports, "0.0.0.0:80": ""})
    controller, _ = world.start()
    async with asyncio.timeout(WAIT_S):
        while not (controller._held and controller.nodes.ready()):
            await asyncio.sleep(0.01)
    (report,) = controller.nodes.ready()
    assert report.ports.keys() == {*ports, "0.0.0.0:80"}
    assert all(report.ports[port] for port in ports)
    assert 0 < len(report.refused) < 2000
    unnamed = 2000 - len(report.refused)
    assert controller.nodes.lagging({}) == [
        f"node a (it refuses {unnamed} more than fit its report)"
    ]
    assert not world.status("gateways", "gw").get("listeners")
    some = dict(list(refused.items())[:400])
    world.report("a", versions=everything, refused=some, ports={**ports, "0.0.0.0:80": ""})
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    assert controller.nodes.ready()[0].refused.keys() == some.keys()


@pytest.mark.parametrize("renewed", ["1970-01-01T00:00:00Z", "2099-01-01T00:00:00Z"])
async def test_clocks_of_nodes_that_are_wrong(world, renewed):
    """A node lives while its Lease changes, whatever time it says it is."""
    lease = world.server.get(LEASES, "weft-node.a", NAMESPACE)
    changed = world.server.change(lease, {"spec": {"renewTime": renewed}})
    world.server.change(changed, {"spec": {"leaseDurationSeconds": 1}})
    controller, _ = world.start()
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    assert [one.node for one in controller.nodes.ready()] == ["a"]
    # It says nothing more.
    async with asyncio.timeout(WAIT_S):
        while controller.nodes.ready():
            await asyncio.sleep(0.01)


async def test_a_token_that_expires(world):
    world.server.auth.token("first", "controller")
    world.server.kubeconfig(world.kubeconfig, token="first")
    world.start()
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    world.server.auth.tokens.clear()
    world.server.auth.token("second", "controller")
    world.server.create(route("r"))
    world.server.cut_connections()
    asked = len(world.server.requests)
    async with asyncio.timeout(WAIT_S):
        # In vain.
        while len(world.server.requests) < asked + 30:
            await asyncio.sleep(0.01)
    assert not world.status("httproutes", "r")
    world.server.kubeconfig(world.kubeconfig, token="second")
    await world.until(lambda: world.conditions("httproutes", "r")["Accepted"] == "True")


async def test_a_right_that_comes_later_than_the_controller(world, caplog):
    """Others are not held up meanwhile; nothing else has to change for what waits."""
    server = world.server
    server.auth.token("admin", "admin", groups=["system:masters"])
    server.auth.service_account("controller", NAMESPACE, "weft-controller")
    server.kubeconfig(world.kubeconfig, token="controller")
    for obj in manifests.objects():
        if obj["apiVersion"].startswith("rbac.") and "namespace" not in obj["metadata"]:
            server.create(obj)
    apart = f"{NAMESPACE}-secrets"
    server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": apart}})
    for obj in manifests.objects():
        if obj["kind"] in ("Role", "RoleBinding"):
            server.create(obj)
    role = server.get("rbac.authorization.k8s.io/clusterroles", "weft-controller", "")
    without = copy.deepcopy(role)
    for rule in without["rules"]:
        rule["resources"] = [one for one in rule["resources"] if one != "httproutes/status"]
    server.change(role, {"rules": without["rules"]})
    server.auth.rbac = True
    for number in range(20):
        server.create(route(f"r{number}"))
    world.start(secrets_namespace=apart)
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    # A node may write Leases, but not the one by which this controller leads.
    assert server.get(LEASES, "weft-controller", apart)["spec"]["holderIdentity"] == "one"
    server.auth.service_account("agent", NAMESPACE, "weft-agent")
    agent = server.kubeconfig(world.kubeconfig.with_name("agent"), token="agent")
    client = Client(agent)
    try:
        await client.open()
        path = f"/apis/coordination.k8s.io/v1/namespaces/{apart}/leases/weft-controller"
        query = {"fieldManager": "x", "force": "true"}
        with pytest.raises(ServerError, match='cannot patch resource "leases"'):
            await client.request("PATCH", path, query, {}, content_type=APPLY)
    finally:
        await client.close()
    async with asyncio.timeout(WAIT_S):
        while 'cannot patch resource "httproutes/status"' not in caplog.text:
            await asyncio.sleep(0.01)
    server.change(role, {"rules": role["rules"]})
    await world.until(
        lambda: all(world.conditions("httproutes", f"r{n}")["Accepted"] for n in range(20))
    )
    assert len([line for line in caplog.messages if "cannot patch resource" in line]) == 1


async def test_a_controller_is_not_ready_before_everything_has_been_read(world):
    """It lives, as its kubelet hears, and could not lead; nor does it write anything."""
    world.server.faults.about, world.server.faults.refuse = "/httproutes", 1.0
    port = free_port()
    controller, _ = world.start(health_port=port)

    async def ask(path):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return (await reader.read()).decode()

    async with asyncio.timeout(WAIT_S):
        while world.server.faults.refused < 5 or not controller.election.leading:
            await asyncio.sleep(0.01)
    assert " 503 " in (refused := await ask("/readyz"))
    assert "not ready: the cluster's objects have not been read yet" in refused
    assert " 200 " in await ask("/healthz")
    assert controller.writer.writes == 0
    world.server.faults.refuse = 0.0
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    assert " 200 " in await ask("/readyz")


async def test_a_slow_server(world):
    """Everything takes a tenth of a second, and is said in the end, once."""
    world.server.faults.delay_s = 0.1
    for number in range(10):
        world.server.create(route(f"r{number}"))
    controller, _ = world.start()
    await world.until(
        lambda: all(world.conditions("httproutes", f"r{n}")["Accepted"] for n in range(10))
    )
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    assert controller.writer.writes <= 14


async def test_never_two_lead_however_slow_the_lease_is(world):
    """Each has seen no renewal for as long as the Lease says before it takes it, and who cannot
    renew it in time stops before that."""
    leading, both, turns = set(), [], []

    def changed(name):
        def said(leads):
            (leading.add if leads else leading.discard)(name)
            turns.append((name, leads))
            both.extend(leading if len(leading) > 1 else ())

        return said

    client = Client(world.kubeconfig)
    await client.open()
    times = {"lease_s": 1.0, "renew_s": 0.6, "retry_s": 0.05}
    names = ("one", "two", "three")
    elections = [Election(client, NAMESPACE, name, changed(name), **times) for name in names]
    tasks = [asyncio.ensure_future(one.run()) for one in elections]
    try:
        await world.until(lambda: leading)
        for _ in range(2):
            lost = len(turns)
            # Slower than the leader can wait, then quick again.
            world.server.faults.about = "/leases/weft-controller"
            world.server.faults.delay_s = 0.7
            async with asyncio.timeout(WAIT_S):
                while len(turns) == lost:
                    await asyncio.sleep(0.01)
            assert not turns[-1][1]
            world.server.faults.delay_s = 0.0
            async with asyncio.timeout(WAIT_S):
                while not leading:
                    await asyncio.sleep(0.01)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
    assert not both
    assert not leading


async def test_a_renewal_that_is_answered_late_counts_from_when_it_was_sent(world):
    """And what is not answered at all after it ends no later than the Lease does for others."""
    client = Client(world.kubeconfig)
    await client.open()
    times = {"lease_s": 1.0, "renew_s": 0.6, "retry_s": 0.05}
    election = Election(client, NAMESPACE, "one", lambda leads: None, **times)
    task = asyncio.ensure_future(election.run())
    try:
        await world.until(lambda: election.leading)
        world.server.faults.about = "/leases/weft-controller"
        world.server.faults.late_s = 0.5
        renewals = world.server.store.watch(LEASES)
        async with asyncio.timeout(WAIT_S):
            await renewals.get()
        world.server.faults.delay_s = 10
        assert election.leading
        # For so long nobody else takes it.
        await asyncio.sleep(times["lease_s"])
        assert not election.leading
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


@pytest.mark.parametrize("garbage", [b"<html>", b"null", b"{}", b'{"kind": "Lease"}'])
async def test_answers_that_are_none(world, garbage):
    """To a controller that leads: it goes on, and leads still. Nor does an empty Lease end it."""
    lease = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "weft-controller", "namespace": NAMESPACE},
    }
    world.server.create(lease)
    controller, task = world.start()
    controller.election._retry_s = 0.05
    await world.until(lambda: world.conditions()["Programmed"] == "True")
    # And while it writes.
    world.server.create(route("s"))
    world.server.faults.garbage = {"/status": garbage}
    async with asyncio.timeout(WAIT_S):
        while not any("/s/status" in path for _, path in world.server.requests):
            await asyncio.sleep(0.01)
    world.server.faults.garbage = {"": garbage}
    world.server.cut_connections()
    asked = len(world.server.requests)
    async with asyncio.timeout(WAIT_S):
        while len(world.server.requests) < asked + 30:
            await asyncio.sleep(0.01)
    world.server.faults.garbage = {}
    world.server.create(route("r"))
    for name in ("r", "s"):
        await world.until(
            lambda name=name: world.conditions("httproutes", name)["Accepted"] == "True"
        )
    assert controller.election.leading
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_kind_that_is_served_no_more_is_waited_for_by_nobody(world):
    """Nodes know nothing of it any more, so they will never have it in force."""
    report = {kind: 10**9 for _, kind in KINDS}
    world.report(ports={"0.0.0.0:80": ""}, versions={**report, "GRPCRoute": 1})
    grpc = {**route("g"), "kind": "GRPCRoute"}
    grpc["spec"] = {"parentRefs": [{"name": "gw"}]}
    world.server.create(grpc)
    controller, _ = world.start()
    controller._source._discovery_s = 0.05
    async with asyncio.timeout(WAIT_S):
        while not controller._held:
            await asyncio.sleep(0.01)
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"grpcroutes.{GROUP}"},
    }
    world.server.delete(crd)
    del report["GRPCRoute"]
    world.server.create(route("r"))
    world.server.cut_connections()
    world.report(ports={"0.0.0.0:80": ""}, versions=report)
    await world.until(lambda: world.conditions("httproutes", "r")["Accepted"] == "True")


async def test_nodes_outlive_an_api_server_that_is_away(world):
    """Nobody can renew a Lease meanwhile. Afterwards each node has its time again, and no status
    shows fewer addresses until that is over."""
    for name in ("a", "b"):
        world.report(name, ports={"0.0.0.0:80": ""}, addresses=(f"192.0.2.{ord(name)}",))
        lease = world.server.get(LEASES, f"weft-node.{name}", NAMESPACE)
        world.server.change(lease, {"spec": {"leaseDurationSeconds": 1}})
    controller, _ = world.start()

    def addresses():
        return [one["value"] for one in world.status("gateways", "gw")["addresses"]]

    await world.until(lambda: addresses() == ["192.0.2.97", "192.0.2.98"])
    history = world.server.store.watch(f"{GROUP}/gateways")
    world.server.faults.away = True
    world.server.cut_connections()
    await asyncio.sleep(1.5)
    assert len(controller.nodes.ready()) == 2
    lease = world.server.get(LEASES, "weft-node.a", NAMESPACE)
    world.server.change(lease, {"metadata": {"labels": {"again": "1"}}})
    world.server.faults.away = False
    # What is asked for now is said of both.
    generation = world.server.change(gateway(), {"spec": {"listeners": LISTENERS}})
    number = generation["metadata"]["generation"]
    await world.until(
        lambda: world.status("gateways", "gw")["conditions"][0]["observedGeneration"] == number
    )
    assert len(addresses()) == 2
    # One of them is not heard of again.
    async with asyncio.timeout(WAIT_S):
        while len(controller.nodes.ready()) == 2:
            world.server.change(lease, {"metadata": {"labels": {"n": str(time.monotonic())}}})
            await asyncio.sleep(0.05)
    await world.until(lambda: addresses() == ["192.0.2.97"])
    while not history.empty():
        assert history.get_nowait().new["status"]["addresses"]
