"""The Kubernetes source against a server over HTTP: what changes, what stays, what goes wrong."""

import asyncio
import itertools
import json
import random

import pytest
from apiserver.server import ApiServer
from kube_world import CRDS, GROUP, WAIT_S, config_map, following, needs_crds, route
from loops import advance, on_virtual_loop

from mesh.model.meta import ObjectKey
from mesh.policy import unreadable
from mesh.sources.kubernetes_client import Backoff, Client, ServerError

ONLY = frozenset(("ConfigMap",))


@pytest.fixture
async def server():
    async with ApiServer(bookmark_s=0.05) as found:
        yield found


async def test_everything_first_and_then_every_change(server, tmp_path):
    server.create(config_map("a"))
    server.create(config_map("b"))
    async with following(server, tmp_path, kinds=ONLY) as source:
        assert source.values() == {"a": "1", "b": "1"}
        server.change(config_map("a"), {"data": {"ca.crt": "2"}})
        server.delete(config_map("b"))
        server.create(config_map("c"))
        await source.until(lambda: source.values() == {"a": "2", "c": "1"})
        # What Weft does not read changes nothing.
        server.change(config_map("a"), {"data": {"other": "x" * 1000}})
        server.change(config_map("a"), {"data": {"ca.crt": "3"}})
        await source.until(lambda: source.values() == {"a": "3", "c": "1"})
        assert [one for one in source.changes() if one[0] == "a"] == [
            ("a", "1"),
            ("a", "2"),
            ("a", "3"),
        ]


async def test_lists_come_in_pages(server, tmp_path, monkeypatch):
    monkeypatch.setattr("mesh.sources.kubernetes._PAGE_OF_LARGE", 7)
    for number in range(30):
        server.create(config_map(f"c{number}"))
    async with following(server, tmp_path, kinds=ONLY) as source:
        assert len(source.values()) == 30
    pages = [path for method, path in server.requests if "continue=" in path]
    assert len(pages) == 4


async def test_a_list_that_is_compacted_between_two_pages(server, tmp_path, monkeypatch):
    monkeypatch.setattr("mesh.sources.kubernetes._PAGE_OF_LARGE", 10)
    for number in range(25):
        server.create(config_map(f"c{number:02}"))
    pages = 0
    plain = server._list

    def compacting(request, target):
        nonlocal pages
        pages += 1
        answer = plain(request, target)
        if pages == 1:
            # One that has been told of already, one that has not.
            server.delete(config_map("c00"))
            server.delete(config_map("c24"))
            server.store.compact()
        return answer

    monkeypatch.setattr(server, "_list", compacting)
    async with following(server, tmp_path, kinds=ONLY) as source:
        assert sorted(source.values()) == [f"c{number:02}" for number in range(1, 24)]
    assert pages == 3


async def test_watches_cut_at_random_miss_nothing_and_repeat_nothing(server, tmp_path):
    dice = random.Random(2)
    server.faults.about = "configmaps"
    server.faults.cut_watches = 100
    expected = {}
    async with following(server, tmp_path, kinds=ONLY) as source:
        number = 0
        while server.faults.cut_watches > 0:
            number += 1
            name = f"c{dice.randrange(10)}"
            if name in expected and dice.random() < 0.3:
                del expected[name]
                server.delete(config_map(name))
            elif name in expected:
                expected[name] = str(number)
                server.change(config_map(name), {"data": {"ca.crt": str(number)}})
            else:
                expected[name] = str(number)
                server.create(config_map(name, str(number)))
            # Each change is seen, so none may be missed and none told twice.
            revision = server.store.revision
            await source.until(lambda at=revision: source.versions.get("ConfigMap", 0) >= at)
            assert source.values() == expected
        assert server.faults.cuts == 100
        told = source.changes()
        assert len(told) == number
        for name in {name for name, _ in told}:
            history = [value for other, value in told if other == name]
            assert all(a != b for a, b in itertools.pairwise(history))
    lists = [path for _, path in server.requests if "/configmaps?" in path and "watch" not in path]
    assert len(lists) == 1


async def test_a_server_that_was_restored_from_a_backup(server, tmp_path, monkeypatch):
    """What was seen last is in its future, from where a watch hears nothing, not even bookmarks."""
    monkeypatch.setattr("mesh.sources.kubernetes_watch._WATCH_S", (1, 1))
    server.create(config_map("a"))
    backup = server.store.revision
    async with following(server, tmp_path, kinds=ONLY) as source:
        server.change(config_map("a"), {"data": {"ca.crt": "2"}})
        server.create(config_map("lost"))
        for number in range(10):
            server.create(config_map(f"more-{number}"))
        await source.reached(server, "ConfigMap")
        server.faults.away = True
        await server.stop_listening()
        server.store.restore(backup)
        server.create(config_map("new"))
        server.faults.away = False
        await server.listen()
        await source.until(lambda: source.values() == {"a": "1", "new": "1"})


@pytest.mark.parametrize(("as_status", "code"), [(False, 410), (True, 410), (False, 500)])
async def test_after_410_only_what_differs_is_told(server, tmp_path, as_status, code):
    """Or after a watch that has ended with another error: what it missed is not known."""
    server.faults.gone_as_status, server.faults.gone_code = as_status, code
    for name in ("kept", "changed", "deleted", "recreated"):
        server.create(config_map(name))
    async with following(server, tmp_path, kinds=ONLY) as source:
        before = len(source.told)
        # The watch ends, and what happens until it is back is compacted away.
        server.faults.away = True
        await server.stop_listening()
        server.change(config_map("changed"), {"data": {"ca.crt": "2"}})
        server.delete(config_map("deleted"))
        server.delete(config_map("recreated"))
        server.create(config_map("recreated", "2"))
        server.create(config_map("new"))
        server.store.compact()
        server.faults.away = False
        await server.listen()
        await source.until(lambda: "new" in source.values())
        assert sorted(source.changes()[before:], key=str) == [
            ("changed", "2"),
            ("deleted", None),
            ("new", "1"),
            ("recreated", "2"),
        ]


async def test_deleted_and_recreated_between_two_events(server, tmp_path):
    server.create(config_map("a"))
    async with following(server, tmp_path, kinds=ONLY) as source:
        first = source.state["ConfigMap"][ObjectKey("default", "a")].metadata.uid
        server.delete(config_map("a"))
        server.create(config_map("a"))
        await source.until(
            lambda: (
                source.state["ConfigMap"]
                .get(ObjectKey("default", "a"), source.state["ConfigMap"].get("none"))
                .metadata.uid
                != first
                if ObjectKey("default", "a") in source.state["ConfigMap"]
                else False
            )
        )
        assert source.values() == {"a": "1"}


@needs_crds
async def test_one_that_cannot_be_read_takes_anothers_name_and_goes(server, tmp_path):
    """Deleted and made again while nobody looks: what was in force was the other one's."""
    server.install_crds(CRDS)
    server.create(route("r"))
    server.create(route("other"))
    async with following(server, tmp_path, kinds=frozenset(("HTTPRoute",))) as source:
        server.faults.away = True
        server.cut_connections()
        server.delete(route("r"))
        path = {"type": "PathPrefix", "value": "/%zz"}
        wrong = route("r")
        wrong["spec"]["rules"][0]["matches"][0]["path"] = path
        server.create(wrong)
        server.store.compact()
        server.faults.away = False
        await source.until(lambda: any(p.name == "r" for p in source.problems))
        assert [key.name for key in source.state["HTTPRoute"]] == ["other"]
        server.delete(wrong)
        await source.until(lambda: not any(p.name == "r" for p in source.problems))


async def test_refusals_are_outlasted(server, tmp_path):
    server.faults.about = "configmaps"
    server.faults.refuse = 0.5
    server.create(config_map("a"))
    server.faults.cut_watches = 20
    async with following(server, tmp_path, kinds=ONLY) as source:
        for number in range(40):
            server.change(config_map("a"), {"data": {"ca.crt": f"v{number}"}})
            await source.until(lambda n=number: source.values() == {"a": f"v{n}"})
        assert len(source.changes()) == 41
    assert server.faults.refused > 10


async def test_a_slow_server_is_waited_for(server, tmp_path):
    server.faults.delay_s = 0.2
    server.create(config_map("a"))
    async with following(server, tmp_path, kinds=ONLY) as source:
        server.change(config_map("a"), {"data": {"ca.crt": "2"}})
        await source.until(lambda: source.values() == {"a": "2"})
        assert source.problems == ()


async def test_a_long_answer_may_take_its_time(tmp_path, monkeypatch):
    """More than a request may, but none of its parts does."""
    monkeypatch.setattr("mesh.sources.kubernetes_client._REQUEST_S", 0.5)
    answer = b'{"kind": "ConfigMap", "metadata": {"resourceVersion": "1"}}'

    async def slowly(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer))
        for at in range(0, len(answer), 10):
            await asyncio.sleep(0.11)
            writer.write(answer[at : at + 10])
        writer.close()

    async with await asyncio.start_server(slowly, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        file = tmp_path / "kubeconfig"
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        config = {"clusters": [cluster], "contexts": [context], "current-context": "c"}
        file.write_text(json.dumps({**config, "users": [{"name": "u", "user": {}}]}))
        client = Client(file)
        await client.open()
        assert (await client.request("GET", "/api/v1/slow"))["kind"] == "ConfigMap"
        await client.close()


async def test_a_server_that_is_away_takes_nothing_away(server, tmp_path):
    server.create(config_map("a"))
    async with following(server, tmp_path, kinds=ONLY) as source:
        server.faults.away = True
        await server.stop_listening()
        await source.until(lambda: any(p.kind == "ConfigMap" for p in source.problems))
        assert source.values() == {"a": "1"}
        server.create(config_map("b"))
        server.faults.away = False
        await server.listen()
        await source.until(lambda: source.values() == {"a": "1", "b": "1"})
        await source.until(lambda: source.problems == ())


async def test_a_server_that_is_not_there_at_first(tmp_path):
    server = ApiServer(bookmark_s=0.05)
    async with server:
        await server.stop_listening()
        server.create(config_map("a"))
        async with following(server, tmp_path, kinds=ONLY, wait=False) as source:
            await source.until(lambda: source.problems)
            assert not source.complete
            assert server.url in source.problems[0].message
            await server.listen()
            await source.until(lambda: source.complete)
            assert source.values() == {"a": "1"}


async def test_a_token_that_expires_is_read_again(server, tmp_path):
    server.auth.token("first", "somebody")
    server.create(config_map("a"))
    async with following(server, tmp_path, kinds=ONLY, token="first") as source:
        server.auth.tokens.clear()
        server.auth.token("second", "somebody")
        server.faults.cut_watches = 1
        server.change(config_map("a"), {"data": {"ca.crt": "2"}})
        server.change(config_map("a"), {"data": {"ca.crt": "3"}})
        server.kubeconfig(tmp_path / "kubeconfig", token="second")
        await source.until(lambda: source.values() == {"a": "3"})
        server.change(config_map("a"), {"data": {"ca.crt": "4"}})
        await source.until(lambda: source.values() == {"a": "4"})


@needs_crds
async def test_kinds_that_appear_and_go(server, tmp_path):
    kinds = frozenset(("ConfigMap", "HTTPRoute"))
    server.create(config_map("a"))
    async with following(server, tmp_path, kinds=kinds) as source:
        assert source.values() == {"a": "1"}
        (problem,) = source.problems
        assert (problem.kind, problem.level) == ("HTTPRoute", "warning")
        server.install_crds(CRDS)
        server.create(route("r"))
        await source.until(lambda: source.state.get("HTTPRoute"))
        assert source.problems == ()
        crd = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "httproutes.gateway.networking.k8s.io"},
        }
        server.delete(crd)
        await source.until(lambda: not source.state["HTTPRoute"])
        server.faults.cut_watches = 1
        await source.until(lambda: any(p.kind == "HTTPRoute" for p in source.problems))


@needs_crds
async def test_a_kind_that_seems_to_be_gone_is_looked_for_twice_before_it_is_forgotten(
    server, tmp_path
):
    """A server that starts, or a proxy in front, answers 404 too: without its policies all is open
    that they close."""
    server.install_crds(CRDS)
    server.create(route("r"))
    kinds = frozenset(("HTTPRoute",))
    faults = server.faults

    def gone():
        faults.about, faults.refuse, faults.codes = f"/apis/{GROUP}", 1.0, (404,)
        server.cut_connections()

    async with following(server, tmp_path, kinds=kinds, discovery_s=3600) as source:
        told = len(source.told)
        gone()
        await source.until(lambda: source.problems)
        # Soon after is no second look: many kinds may end at once.
        asked = faults.refused
        source.source._look_now.set()
        async with asyncio.timeout(WAIT_S):
            while faults.refused == asked:
                await asyncio.sleep(0.01)
        (problem,) = source.problems
        assert (problem.kind, problem.level) == ("HTTPRoute", "error")
        assert "stays in force" in problem.message
        faults.refuse = 0.0
        source.source._look_now.set()
        await source.until(lambda: not source.problems)
        assert len(source.told) == told
        assert source.state["HTTPRoute"]
    async with following(server, tmp_path, kinds=kinds) as source:
        gone()
        await source.until(lambda: not source.state["HTTPRoute"])
        assert {problem.level for problem in source.problems} == {"warning"}


@needs_crds
async def test_a_kind_whose_version_is_served_no_more(server, tmp_path):
    """But another is, after an upgrade of its CustomResourceDefinition: nothing goes meanwhile, and
    nothing is missed."""
    server.install_crds(CRDS)
    name = f"httproutes.{GROUP}"
    crd = server.get("apiextensions.k8s.io/customresourcedefinitions", name, "")

    def serve(version):
        versions = [{**one, "served": one["name"] == version} for one in crd["spec"]["versions"]]
        server.change(crd, {"spec": {"versions": versions}})

    serve("v1beta1")
    for number in range(3):
        server.create({**route(f"r{number}"), "apiVersion": f"{GROUP}/v1beta1"})
    kinds = frozenset(("HTTPRoute",))
    async with following(server, tmp_path, kinds=kinds, discovery_s=3600) as source:
        assert source.source.version("HTTPRoute") == "v1beta1"
        assert len(source.state["HTTPRoute"]) == 3
        told = len(source.told)
        serve("v1")
        server.delete(route("r0"))
        server.create(route("r3"))
        server.cut_connections()
        await source.until(lambda: ObjectKey("default", "r3") in source.state["HTTPRoute"])
        await source.until(lambda: len(source.state["HTTPRoute"]) == 3 and not source.problems)
        assert source.source.version("HTTPRoute") == "v1"
        assert sorted((name, obj is None) for _, name, obj in source.told[told:]) == [
            ("r0", True),
            ("r3", False),
        ]


@needs_crds
async def test_an_object_that_breaks_a_rule_keeps_its_last_good_version(server, tmp_path):
    server.install_crds(CRDS)
    server.create(route("r", "/a"))
    async with following(server, tmp_path, kinds=frozenset(("HTTPRoute",))) as source:
        # The test server knows no CEL; a path with // is what a rule of the CRD forbids.
        match = {"path": {"type": "PathPrefix", "value": "/b//c"}}
        server.change(route("r"), {"spec": {"rules": [{"matches": [match]}]}})
        await source.until(lambda: source.problems)
        (problem,) = source.problems
        assert (problem.file, problem.kind, problem.namespace, problem.name) == (
            "cluster",
            "HTTPRoute",
            "default",
            "r",
        )
        assert problem.message.endswith("its last good version stays in force")
        (obj,) = source.state["HTTPRoute"].values()
        assert obj.spec.rules[0].matches[0].path.value == "/a"
        server.delete(route("r"))
        await source.until(lambda: not source.state["HTTPRoute"])
        assert source.problems == ()


async def test_a_policy_that_cannot_be_read_denies(server, tmp_path):
    metadata = {"name": "p", "namespace": "default"}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata}
    server.create({**policy, "spec": {"podSelector": {}, "ingress": 7}})
    async with following(server, tmp_path, kinds=frozenset(("NetworkPolicy",))) as source:
        (obj,) = source.state["NetworkPolicy"].values()
        assert "spec.ingress" in unreadable.why(obj)
        assert obj.spec.policy_types == ("Ingress", "Egress")
        assert obj.metadata.uid
        assert "it denies for whom it selects" in source.problems[0].message
        # Of a newer version: without what is not known it would be a rule about everybody.
        server.change(policy, {"spec": {"ingress": [{"fromNew": [{}]}]}})
        await source.until(lambda: "fromNew" in str(source.problems))
        (obj,) = source.state["NetworkPolicy"].values()
        assert "fromNew" in unreadable.why(obj)
        server.change(policy, {"spec": {"ingress": [{}]}})
        await source.until(lambda: not source.problems)
        (obj,) = source.state["NetworkPolicy"].values()
        assert unreadable.why(obj) == ""
        # From now on there is a last good version.
        server.change(policy, {"spec": {"ingress": 7}})
        await source.until(lambda: source.problems)
        assert source.problems[0].message.endswith("its last good version stays in force")
        (obj,) = source.state["NetworkPolicy"].values()
        assert unreadable.why(obj) == ""


async def test_fields_of_newer_versions_are_passed_over_in_built_in_kinds(server, tmp_path):
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        # Names that begin with a digit are allowed since Kubernetes 1.34.
        "metadata": {"name": "1st"},
        "spec": {"ports": [{"port": 80, "brandNew": True}], "novel": {"a": [1]}},
    }
    server.create(service)
    async with following(server, tmp_path, kinds=frozenset(("Service",))) as source:
        assert source.problems == ()
        (obj,) = source.state["Service"].values()
        assert obj.spec.ports[0].port == 80


async def test_of_pods_and_namespaces_only_what_is_needed(server, tmp_path):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "p",
            "labels": {"app": "p"},
            "annotations": {"weft.dev/sockmap": "disabled", "example.com/big": "x" * 1000},
        },
        "spec": {"nodeName": "b", "serviceAccountName": "s", "containers": [{"name": "c"}]},
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}}
    server.create(pod)
    server.create(namespace)
    kinds = frozenset(("Pod", "Namespace"))
    async with following(server, tmp_path, kinds=kinds) as source:
        (found,) = source.state["Pod"].values()
        assert found.metadata.annotations == {"weft.dev/sockmap": "disabled"}
        assert (found.spec.node_name, found.metadata.labels) == ("b", {"app": "p"})
        before = len(source.told)
        server.change(pod, {"metadata": {"annotations": {"example.com/big": "y"}}})
        server.change(pod, {"metadata": {"labels": {"app": "q"}}})
        await source.until(lambda: len(source.told) > before)
        assert [name for kind, name, _ in source.told[before:]] == ["p"]
        # Of namespaces nothing but metadata is asked for.
        server.change(namespace, {"metadata": {"labels": {"weft.dev/mesh": "disabled"}}})
        key = ObjectKey("", "n")
        await source.until(
            lambda: source.state["Namespace"][key].metadata.labels.get("weft.dev/mesh")
        )
    asked = [accept for path, accept in server.accepted if "/namespaces" in path]
    assert asked
    assert all("PartialObjectMetadata" in accept for accept in asked)


async def test_large_objects_survive(server, tmp_path):
    big = config_map("big")
    big["data"]["ca.crt"] = "x" * 1_500_000
    server.create(big)
    for number in range(30):
        server.create(config_map(f"c{number}"))
    async with following(server, tmp_path, kinds=ONLY) as source:
        # Nor are there hundreds of them in one answer.
        assert sum("continue=" in path for _, path in server.requests) == 1
        assert len(source.values()["big"]) == 1_500_000
        server.change(big, {"data": {"ca.crt": "y" * 1_500_000}})
        await source.until(lambda: source.values()["big"].startswith("y"))


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>a login page</html>",
        b"\xff\xfe",
        b"",
        b"null",
        b"[1]",
        b"{}",
        b'{"kind": "List", "items": [{"metad',
        b'{"kind": "ConfigMapList", "metadata": {}, "items": []}',
        b'{"kind": "List", "metadata": {"resourceVersion": "9"}, "items": [null]}',
        b'{"kind": "List", "metadata": {"resourceVersion": "9"}, "items": [{"metadata": []}]}',
        b'{"type": "ERROR", "object": 5}\n',
        b'{"type": "MODIFIED", "object": {"metadata": {"name": "a"}}}\n',
        b'{"type": "BOOKMARK", "object": {"metadata": {}}}\n',
        b'{"type": 7}\n{"type": "ADDED"}\n',
    ],
)
async def test_answers_that_are_none(server, tmp_path, garbage):
    """Something else answers in the server's place, or half of what it said comes: to who asks what
    there is, who reads everything, and who goes on from where it was."""

    async def asked():
        before = len(server.requests)
        async with asyncio.timeout(WAIT_S):
            while len(server.requests) < before + 3:
                await asyncio.sleep(0.005)

    server.create(config_map("a"))
    server.faults.garbage = {"": garbage}
    async with following(server, tmp_path, kinds=ONLY, wait=False) as source:
        await asked()
        server.faults.garbage = {"/configmaps": garbage}
        await asked()
        assert not source.complete
        server.faults.garbage = {}
        await source.until(lambda: source.values() == {"a": "1"})
        server.faults.garbage = {"/configmaps": garbage}
        server.cut_connections()
        await asked()
        server.faults.garbage = {}
        server.change(config_map("a"), {"data": {"ca.crt": "2"}})
        await source.until(lambda: source.values() == {"a": "2"} and not source.problems)
    assert source.changes() == [("a", "1"), ("a", "2")]


@needs_crds
async def test_a_right_that_is_missing_is_named_and_holds_up_nothing_that_is_there(
    server, tmp_path
):
    """Nothing is complete before everything has been read; what has been stays in force, and the
    other kinds go on, when a right is taken away."""
    server.install_crds(CRDS)
    server.create(route("r", "/1"))
    server.create(config_map("a"))
    server.auth.token("agent", "agent")
    server.auth.token("admin", "admin", groups=["system:masters"])
    rbac = "rbac.authorization.k8s.io"
    about = {"apiVersion": f"{rbac}/v1", "metadata": {"name": "agent"}}
    some = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "watch"]}
    more = {**some, "apiGroups": [GROUP], "resources": ["httproutes"]}
    role = server.create({**about, "kind": "ClusterRole", "rules": [some]})
    ref = {"apiGroup": rbac, "kind": "ClusterRole", "name": "agent"}
    subjects = [{"apiGroup": rbac, "kind": "User", "name": "agent"}]
    binding = {**about, "kind": "ClusterRoleBinding", "roleRef": ref, "subjects": subjects}
    server.create(binding)
    server.auth.rbac = True
    kinds = frozenset(("ConfigMap", "HTTPRoute"))
    async with following(server, tmp_path, kinds=kinds, token="agent", wait=False) as source:

        def named():
            return 'cannot list resource "httproutes"' in str(source.problems)

        await source.until(named)
        assert not source.complete
        server.change(role, {"rules": [some, more]})
        await source.until(lambda: source.complete and not source.problems)
        server.change(role, {"rules": [some]})
        server.cut_connections()
        server.change(config_map("a"), {"data": {"ca.crt": "2"}})
        server.change(route("r"), {"metadata": {"labels": {"a": "b"}}})
        server.store.compact()
        await source.until(
            lambda: source.values() == {"a": "2"} and "httproutes" in str(source.problems)
        )
        assert not source.state["HTTPRoute"][ObjectKey("default", "r")].metadata.labels
        server.change(role, {"rules": [some, more]})
        await source.until(lambda: not source.problems)
        await source.until(
            lambda: source.state["HTTPRoute"][ObjectKey("default", "r")].metadata.labels
        )


async def test_only_secrets_that_listeners_can_refer_to(server, tmp_path):
    secrets = {}
    for kind in ("kubernetes.io/tls", "Opaque"):
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": kind.rpartition("/")[2].lower()},
            "type": kind,
            "data": {"tls.crt": "eA==", "tls.key": "eA==", "more": "eA=="},
        }
        secret["metadata"]["labels"] = {"a": "b"}
        secrets[kind] = secret
        server.create(secret)
    async with following(server, tmp_path, kinds=frozenset(("Secret",))) as source:
        found = {key.name: secret for key, secret in source.state["Secret"].items()}
        assert sorted(found["tls"].data) == ["tls.crt", "tls.key"]
        # Of others it is known that they are there, and no more.
        assert (found["opaque"].type, found["opaque"].data) == ("other", {})
        assert found["opaque"].metadata.labels == {"a": "b"}
        # One takes the name of the other.
        server.delete(secrets["Opaque"])
        secrets["Opaque"]["type"] = "kubernetes.io/tls"
        server.create(secrets["Opaque"])
        key = ObjectKey("default", "opaque")
        await source.until(lambda: source.state["Secret"].get(key, found["opaque"]).data)
    lists = [path for _, path in server.requests if "/secrets?" in path]
    assert all("fieldSelector" in path for path in lists)


@needs_crds
async def test_a_relist_while_many_routes_change(server, tmp_path):
    server.install_crds(CRDS)
    for number in range(1000):
        server.create(route(f"r{number}", "/0"))
    async with following(server, tmp_path, kinds=frozenset(("HTTPRoute",))) as source:
        before = len(source.told)
        for number in range(1000):
            server.change(route(f"r{number}"), {"metadata": {"labels": {"n": "1"}}})
            if number % 250 == 100:
                server.faults.cut_watches = 1
                server.store.compact()
                await asyncio.sleep(0)
        await source.until(
            lambda: all(obj.metadata.labels for obj in source.state["HTTPRoute"].values())
        )
        told = [name for _, name, obj in source.told[before:] if obj is not None]
        assert len(source.told) - before == len(told) == len(set(told)) == 1000


async def test_what_waits_for_a_server_goes_on_with_the_first_that_finds_it(server, tmp_path):
    """However long each would have waited by itself."""
    client = Client(server.kubeconfig(tmp_path / "kubeconfig"))
    await client.open()
    try:
        await client.request("GET", "/version")
        await server.stop_listening()
        with pytest.raises(ServerError):
            await client.request("GET", "/version")
        waiting = asyncio.ensure_future(Backoff(3600.0).wait(until=client.reachable))
        await server.listen()
        await client.request("GET", "/version")
        async with asyncio.timeout(WAIT_S):
            await waiting
        # While it answers, every one waits for itself.
        waiting = asyncio.ensure_future(Backoff(3600.0, 3600.0).wait(until=client.reachable))
        await client.request("GET", "/version")
        assert not waiting.done()
        waiting.cancel()
    finally:
        await client.close()


@on_virtual_loop
async def test_pauses_double_up_to_a_limit_and_differ_from_node_to_node():
    backoff = Backoff(1.0, 8.0)
    for most in (1.0, 2.0, 4.0, 8.0, 8.0):
        waiting = asyncio.ensure_future(backoff.wait())
        await asyncio.sleep(0)
        advance(0.49 * most)
        await asyncio.sleep(0)
        assert not waiting.done()
        advance(0.52 * most)
        await waiting
    # What the server asks for is the least.
    waiting = asyncio.ensure_future(Backoff(1.0, 8.0).wait(5.0))
    await asyncio.sleep(0)
    advance(4.9)
    await asyncio.sleep(0)
    assert not waiting.done()
    advance(0.2)
    await waiting
    many = [asyncio.ensure_future(Backoff(1.0).wait()) for _ in range(50)]
    await asyncio.sleep(0)
    advance(0.75)
    await asyncio.sleep(0.01)
    assert 0 < sum(one.done() for one in many) < 50
    advance(0.5)
    await asyncio.gather(*many)
