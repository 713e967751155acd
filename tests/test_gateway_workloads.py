"""Pods as workloads: sections, identities, and load-balancer entries for what pods are asked."""

from __future__ import annotations

import itertools

import pytest

from gateway import workloads
from gateway.control import Options
from gateway.workloads import LabelSet
from mesh.model.identity import FIRST_WORKLOAD
from mesh.model.nodeconfig import LoadBalancerEntry, WorkloadSection
from tests.gateway_world import BACKEND, World, join, objects, plain

MESH = Options(node="n1", mesh_addresses=("127.0.0.1", "::1"))


def pod(
    name: str = "p",
    ips: str = "10.0.0.1",
    *,
    namespace: str = "default",
    node: str = "n1",
    labels: str = "{app: a}",
    annotations: str = "{}",
    account: str = "default",
    phase: str = "Running",
    created: str = "2024-01-01T00:00:00Z",
    host_network: str = "false",
) -> str:
    addresses = ", ".join(f"{{ip: '{ip}'}}" for ip in ips.split())
    return f"""
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {labels}, annotations: {annotations},
  creationTimestamp: '{created}'}}
spec: {{nodeName: {node}, serviceAccountName: {account}, hostNetwork: {host_network}}}
status: {{phase: {phase}, podIPs: [{addresses}]}}
"""


def service(
    name: str,
    ports: str,
    *,
    ip: str = "10.96.0.1",
    namespace: str = "default",
    more: str = "",
) -> str:
    return f"""
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{clusterIP: '{ip}', ports: [{ports}]{more}}}
"""


def piece(
    name: str,
    addresses: str,
    ports: str = "{name: http, port: 8080}",
    *,
    family: str = "IPv4",
    namespace: str = "default",
    conditions: str = "{}",
) -> str:
    endpoints = ", ".join(
        f"{{addresses: ['{one}'], conditions: {conditions}}}" for one in addresses.split()
    )
    return f"""
kind: EndpointSlice
metadata: {{name: {name}-{family.lower()}, namespace: {namespace},
  labels: {{kubernetes.io/service-name: {name}}}}}
addressType: {family}
ports: [{ports}]
endpoints: [{endpoints}]
"""


def world(*texts: str, options: Options = MESH) -> World:
    result = World(options)
    result.apply(join(*texts))
    return result


def workload(world: World, name: str = "p", namespace: str = "default") -> WorkloadSection:
    section = world.sections[f"workload/{namespace}/{name}"]
    assert isinstance(section, WorkloadSection)
    return section


def entry(world: World, place: str, protocol: str = "TCP") -> LoadBalancerEntry:
    section = world.sections[f"entry/{place}/{protocol}"]
    assert isinstance(section, LoadBalancerEntry)
    return section


# --- workloads ------------------------------------------------------------------------------------


def test_a_pod_is_a_workload() -> None:
    section = workload(world(pod(ips="10.0.0.1 fd00::1", account="cart", labels="{b: x, a: y}")))
    assert plain(section) == {
        "type": "workload",
        "namespace": "default",
        "name": "p",
        "addresses": ["10.0.0.1", "fd00::1"],
        "node": "n1",
        "local": True,
        "service_account": "cart",
        "labels": {"a": "y", "b": "x"},
        "identity": LabelSet("default", "cart", (("a", "y"), ("b", "x"))).number,
    }


def test_pods_are_workloads_where_there_is_no_mesh() -> None:
    section = workload(world(pod(), options=Options()))
    assert not section.local
    assert section.identity >= FIRST_WORKLOAD


@pytest.mark.parametrize(
    "text",
    [
        pod(phase="Succeeded"),
        pod(phase="Failed"),
        pod(host_network="true"),
        pod(ips=""),
    ],
)
def test_pods_that_are_no_workloads(text: str) -> None:
    assert world(text).of("workload") == {}


def test_pods_in_their_hosts_network_are_told_that_annotations_do_nothing() -> None:
    asks = "{weft.dev/sockmap: disabled, weft.dev/mtls: STRICT, other: x}"
    found = world(pod(host_network="true", annotations=asks), pod("q", host_network="true"))
    (problem,) = found.told("Pod", "p")
    assert problem.startswith("weft.dev/mtls, weft.dev/sockmap: without effect on this pod")
    assert found.told("Pod", "q") == ()
    found.apply(pod(annotations="{weft.dev/sockmap: disabled}"))
    assert found.told("Pod", "p") == ()


@pytest.mark.parametrize(
    ("of_namespace", "of_pod", "namespace", "meshed"),
    [
        ("{}", "{}", "default", True),
        ("{weft.dev/mesh: disabled}", "{}", "default", False),
        ("{}", "{weft.dev/mesh: disabled}", "default", False),
        ("{weft.dev/mesh: disabled}", "{weft.dev/mesh: enabled}", "default", True),
        ("{}", "{}", "kube-system", False),
        ("{weft.dev/mesh: enabled}", "{}", "kube-system", True),
        ("{}", "{weft.dev/mesh: enabled}", "kube-system", True),
        # What is none does not count.
        ("{weft.dev/mesh: none}", "{weft.dev/mesh: none}", "default", True),
        ("{weft.dev/mesh: none}", "{}", "kube-system", False),
    ],
)
def test_who_is_in_the_mesh(of_namespace: str, of_pod: str, namespace: str, meshed: bool) -> None:
    own = f"{{kind: Namespace, metadata: {{name: {namespace}, labels: {of_namespace}}}}}"
    mine = pod(labels=of_pod, namespace=namespace)
    for order in ((own, mine), (mine, own)):
        found = World(MESH)
        for text in order:
            found.apply(text)
        assert workload(found, namespace=namespace).meshed is meshed
        told = found.told("Pod", "p", namespace) + found.told("Namespace", namespace, "")
        assert len(told) == f"{of_namespace}{of_pod}".count("none")
        assert all("not 'enabled' or 'disabled'" in one for one in told)


def test_a_pod_that_is_out_of_the_mesh_is_left_alone() -> None:
    asks = "{weft.dev/mtls: STRICT, weft.dev/mtls-ports: '80=x'}"
    out = pod("out", "10.0.0.1", labels="{weft.dev/mesh: disabled}", annotations=asks)
    far = pod("far", "10.0.0.2", labels="{weft.dev/mesh: disabled}", node="n2")
    options = Options(node="n1", mesh_addresses=("127.0.0.1",), authority=True)
    strict = "{kind: Namespace, metadata: {name: default, annotations: {weft.dev/mtls: STRICT}}}"
    found = world(
        service("s", HTTP), piece("s", "10.0.0.1 10.0.0.2"), out, far, strict, options=options
    )
    section = workload(found, "out")
    assert section.identity >= FIRST_WORKLOAD
    assert (section.mtls, section.mtls_ports, section.sockmap) == ("DISABLE", {}, False)
    assert section.spiffe_id == ""
    assert list(found.of("entry")) == ["entry/10.96.0.1|80/TCP"]
    backends = entry(found, "10.96.0.1|80").backends
    assert [(one.remote, one.sockmap) for one in backends] == [(False, False)] * 2
    idle, overruled = found.told("Pod", "out")
    assert idle.startswith("weft.dev/mtls, weft.dev/mtls-ports: without effect on this pod: it is")
    assert overruled.startswith("Namespace default asks for mutual TLS (STRICT), without effect")
    assert len(found.told("Pod", "far")) == 1
    found.apply(strict.replace("metadata: {", "metadata: {labels: {weft.dev/mesh: disabled}, "))
    assert found.told("Pod", "far") == ()
    (idle,) = found.told("Namespace", "default", "")
    assert idle.startswith("weft.dev/mtls: without effect on pods of this namespace")


def test_pending_pods_and_those_of_other_nodes_are_workloads() -> None:
    found = world(pod(phase="Pending"), pod("q", "10.0.0.2", node="n2"))
    assert workload(found).local
    assert not workload(found, "q").local


@pytest.mark.parametrize(
    ("value", "expected"), [("disabled", False), ("enabled", True), ("off", False)]
)
def test_sockmap_by_annotation(value: str, expected: bool) -> None:
    found = world(pod(annotations=f"{{weft.dev/sockmap: '{value}'}}"))
    assert workload(found).sockmap is expected


def test_who_is_told_its_clients_is_told_them_where_services_declare_http() -> None:
    asks = pod(annotations="{weft.dev/client-headers: 'true'}")
    found = world(asks, service("s", HTTP), piece("s", "10.0.0.1"))
    assert (workload(found).client_headers, workload(found).http_ports) == (True, (8080,))
    found.apply(service("s", "{name: http, port: 80, appProtocol: tcp}"))
    assert workload(found).http_ports == ()
    found.apply(service("s", "{name: x, port: 80, appProtocol: kubernetes.io/h2c}"))
    found.apply(piece("s", "10.0.0.1", "{name: x, port: 8080}"))
    assert workload(found).http_ports == (8080,)
    found.apply(pod())
    assert workload(found).http_ports == ()


def test_an_address_is_the_younger_pods() -> None:
    found = world(
        pod("old", "10.0.0.1 fd00::1", created="2024-01-01T00:00:00Z"),
        pod("new", "10.0.0.1", created="2024-01-02T00:00:00Z"),
    )
    assert workload(found, "new").addresses == ("10.0.0.1",)
    assert workload(found, "old").addresses == ("fd00::1",)
    found.delete("Pod", "new")
    assert workload(found, "old").addresses == ("10.0.0.1", "fd00::1")


# --- identities -----------------------------------------------------------------------------------


def test_identities_follow_namespace_account_and_labels_alone() -> None:
    same = workload(world(pod("a"), pod("b", "10.0.0.2", node="n2")), "a").identity
    assert same == workload(world(pod("b", "10.0.0.9")), "b").identity
    others = [
        workload(world(pod(labels="{app: b}"))).identity,
        workload(world(pod(account="x"))).identity,
        workload(world(pod(namespace="other")), namespace="other").identity,
        workload(world(pod(labels="{}"))).identity,
    ]
    assert len({same, *others}) == 5


def test_numbers_have_24_bits() -> None:
    numbers = [LabelSet("ns", "sa", (("n", str(n)),)).number for n in range(2000)]
    assert all(FIRST_WORKLOAD <= number < 1 << 24 for number in numbers)
    assert len(set(numbers)) > 1990


def test_sets_with_one_number_are_told_apart_in_whatever_order_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All sets collide here: the hash is made a constant."""
    monkeypatch.setattr(workloads, "numbers", lambda view, labels: 1000)
    texts = [pod(app, f"10.0.0.{n}", labels=f"{{app: {app}}}") for n, app in enumerate("cab")]
    texts.append(pod("again", "10.0.0.9", labels="{app: b}"))
    seen = set()
    for order in itertools.permutations(texts):
        found = World(MESH)
        for text in order:
            found.apply(text)
        seen.add(tuple(workload(found, name).identity for name in ("a", "b", "again", "c")))
    assert seen == {(1000, 1000 | 1 << 24, 1000 | 1 << 24, 1000 | 2 << 24)}


def test_a_pod_costs_its_own_work_only() -> None:
    """The identity of thousands of replicas is computed once."""
    few, many = World(MESH), World(MESH)
    for count, there in ((10, few), (200, many)):
        there.apply(join(*(pod(f"p{n}", f"10.0.{n}.1") for n in range(count))))
    computed = []
    for there in (few, many):
        outcome = there.control._derivation.apply({"Pod": objects(pod("new", "10.1.0.1"))["Pod"]})
        computed.append({table: len(changes) for table, changes in outcome.items()})
    assert computed[0] == computed[1]
    assert "identities" not in computed[0]


# --- what the entries of Services say of workloads ------------------------------------------------

HTTP = "{name: http, port: 80, targetPort: 8080}"


@pytest.mark.parametrize(
    ("port", "http", "sockmap"),
    [
        ("{port: 80, appProtocol: http}", True, True),
        ("{port: 80, appProtocol: HTTP}", True, True),
        ("{port: 80, appProtocol: kubernetes.io/ws}", True, True),
        ("{port: 80, appProtocol: kubernetes.io/h2c}", True, False),
        ("{port: 80, appProtocol: grpc}", True, False),
        ("{port: 80, name: http}", True, True),
        ("{port: 80, name: http-admin}", True, True),
        ("{port: 80, name: http2}", True, False),
        ("{port: 80, name: http2-admin}", True, False),
        ("{port: 80, name: grpc}", True, False),
        ("{port: 80, name: grpc-x}", True, False),
        ("{port: 80, name: httpx}", False, False),
        ("{port: 80, name: https}", False, False),
        ("{port: 80, name: x}", False, False),
        ("{port: 80}", False, False),
        ("{port: 80, name: http, appProtocol: tcp}", False, False),
        ("{port: 80, name: http, appProtocol: https}", False, False),
        ("{port: 80, name: http, appProtocol: kubernetes.io/wss}", False, False),
        ("{port: 80, name: http, protocol: UDP}", False, False),
    ],
)
def test_what_a_port_declares(port: str, http: bool, sockmap: bool) -> None:
    protocol = "UDP" if "UDP" in port else "TCP"
    found = world(service("s", port))
    one = entry(found, "10.96.0.1|80", protocol)
    assert (one.http, one.sockmap) == (http, sockmap)
    assert bool(found.of("service")) == http
    without = world(service("s", port), options=Options())
    assert not entry(without, "10.96.0.1|80", protocol).http


def test_backends_know_whose_pods_they_are() -> None:
    found = world(
        service("s", HTTP),
        piece("s", "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5"),
        pod("here", "10.0.0.1"),
        pod("there", "10.0.0.2", node="n2"),
        pod("plain", "10.0.0.3", annotations="{weft.dev/sockmap: disabled}"),
        pod("host", "10.0.0.4", host_network="true"),
    )
    backends = {
        one.address: (one.remote, one.sockmap) for one in entry(found, "10.96.0.1|80").backends
    }
    assert backends == {
        "10.0.0.1": (False, True),
        "10.0.0.2": (True, False),
        "10.0.0.3": (False, False),
        "10.0.0.4": (False, False),
        "10.0.0.5": (False, False),
    }


def test_without_a_name_no_pod_is_near_or_far() -> None:
    options = Options(mesh_addresses=("127.0.0.1",))
    found = world(service("s", HTTP), piece("s", "10.0.0.1"), pod(), options=options)
    (backend,) = entry(found, "10.96.0.1|80").backends
    assert (backend.remote, backend.sockmap) == (False, False)
    assert not workload(found).local


def test_families_without_a_mesh_address_are_not_steered() -> None:
    options = Options(node="n1", mesh_addresses=("127.0.0.1",))
    more = ", clusterIPs: [10.96.0.1, 'fd96::1']"
    found = world(service("s", HTTP, more=more), options=options)
    assert entry(found, "10.96.0.1|80").http
    assert not entry(found, "fd96::1|80").http
    assert found.sections["service/default/s/80"].addresses == ("10.96.0.1",)  # type: ignore[union-attr]


def test_affinity_stays_with_the_kernel_unless_a_route_is_attached() -> None:
    found = world(service("s", HTTP, more=", sessionAffinity: ClientIP"))
    assert not entry(found, "10.96.0.1|80").http
    assert entry(found, "10.96.0.1|80").affinity_s == 10_800
    assert found.of("service") == {}


def test_affinity_does_not_hold_where_a_route_is_attached_and_that_is_told() -> None:
    found = world(
        service("s", HTTP + ", {name: tcp, port: 81}", more=", sessionAffinity: ClientIP"),
        """
kind: HTTPRoute
metadata: {name: route}
spec: {parentRefs: [{group: '', kind: Service, name: s}]}
""",
    )
    assert entry(found, "10.96.0.1|80").http
    (problem,) = found.told("Service", "s")
    assert problem.startswith("spec.sessionAffinity ClientIP does not hold at port 80: mesh routes")
    found.delete("HTTPRoute", "route")
    assert found.told("Service", "s") == ()


def test_a_local_service_is_reached_on_its_own_node_only() -> None:
    local = service("s", HTTP, more=", internalTrafficPolicy: Local")
    slices = piece("s", "10.0.0.1 10.0.0.2 10.0.0.3")
    for address, node in (("10.0.0.1", "n1"), ("10.0.0.2", "n2")):
        slices = slices.replace(f"['{address}']", f"['{address}'], nodeName: {node}")
    found = world(local, slices)
    assert [one.address for one in entry(found, "10.96.0.1|80").backends] == ["10.0.0.1"]
    (own,) = found.of("cluster").values()
    assert [one.address for one in own.endpoints] == ["10.0.0.1"]
    found.apply(service("s", HTTP, more=", internalTrafficPolicy: Cluster"))
    assert len(entry(found, "10.96.0.1|80").backends) == 3
    nameless = world(local, slices, options=Options(mesh_addresses=("127.0.0.1",)))
    assert len(entry(nameless, "10.96.0.1|80").backends) == 3
    (problem,) = nameless.told("Service", "s")
    assert problem.startswith("spec.internalTrafficPolicy Local does not hold")


# --- pods asked directly --------------------------------------------------------------------------


def test_pods_are_frontends_of_their_own() -> None:
    found = world(
        service("s", HTTP),
        piece("s", "10.0.0.1 10.0.0.2 10.0.0.3"),
        piece("s", "fd00::1", family="IPv6"),
        pod(ips="10.0.0.1 fd00::1"),
        pod("far", "10.0.0.2", node="n2"),
    )
    assert plain(entry(found, "10.0.0.1|8080")) == {
        "type": "entry",
        "address": "10.0.0.1",
        "port": 8080,
        "protocol": "TCP",
        "backends": [{"address": "10.0.0.1", "port": 8080, "sockmap": True}],
        "source": "Pod/default/p",
        "http": True,
        "sockmap": True,
    }
    assert entry(found, "fd00::1|8080").http
    (backend,) = entry(found, "10.0.0.2|8080").backends
    assert (backend.remote, backend.sockmap) == (True, False)
    # Nobody knows a pod there.
    assert "entry/10.0.0.3|8080/TCP" not in found.sections


def test_pods_behind_headless_services_and_pods_that_are_not_ready_are_frontends() -> None:
    found = world(
        service("s", "{name: grpc, port: 7070}", ip="None"),
        piece("s", "10.0.0.1", "{name: grpc, port: 7070}", conditions="{ready: false}"),
        pod(),
    )
    one = entry(found, "10.0.0.1|7070")
    assert (one.http, one.sockmap) == (True, False)
    assert list(found.of("entry")) == ["entry/10.0.0.1|7070/TCP"]


@pytest.mark.parametrize(
    ("first", "second", "http", "sockmap"),
    [
        ("http", "http", True, True),
        ("http", "x", True, True),
        ("x", "y", False, False),
        ("http", "grpc", True, False),
        ("http", "tcp", False, False),
        ("grpc", "https", False, False),
        ("tcp", "x", False, False),
    ],
)
def test_services_that_disagree_about_a_pods_port(
    first: str, second: str, http: bool, sockmap: bool
) -> None:
    found = world(
        service("a", f"{{name: {first}, port: 80}}"),
        service("b", f"{{name: {second}, port: 81}}", ip="None"),
        piece("a", "10.0.0.1", f"{{name: {first}, port: 8080}}"),
        piece("b", "10.0.0.1", f"{{name: {second}, port: 8080}}"),
        pod(),
    )
    one = entry(found, "10.0.0.1|8080")
    assert (one.http, one.sockmap, one.backends[0].sockmap) == (http, sockmap, sockmap)


@pytest.mark.parametrize("second", ["grpc", "tcp"])
def test_what_another_service_says_of_a_pods_port_counts_for_a_services_backends(
    second: str,
) -> None:
    """The kernel knows backends by address and port, whichever Service they were reached by."""
    found = world(
        service("a", HTTP),
        piece("a", "10.0.0.1 10.0.0.2"),
        pod(),
        pod("q", "10.0.0.2"),
    )
    assert [one.sockmap for one in entry(found, "10.96.0.1|80").backends] == [True, True]
    found.apply(service("b", f"{{name: {second}, port: 81}}", ip="None"))
    found.apply(piece("b", "10.0.0.1", f"{{name: {second}, port: 8080}}"))
    one = entry(found, "10.96.0.1|80")
    assert (one.http, one.sockmap) == (True, True)
    assert [backend.sockmap for backend in one.backends] == [False, True]
    found.delete("Service", "b")
    assert [one.sockmap for one in entry(found, "10.96.0.1|80").backends] == [True, True]


def test_what_a_backend_tls_policy_is_about_is_not_enrolled() -> None:
    policy = """
kind: BackendTLSPolicy
metadata: {name: tls}
spec:
  targetRefs: [{group: '', kind: Service, name: s, sectionName: PORT}]
  validation: {hostname: s.test, wellKnownCACertificates: System}
"""
    found = world(service("s", HTTP), piece("s", "10.0.0.1"), pod())
    found.apply(policy.replace("PORT", "other"))
    assert entry(found, "10.96.0.1|80").backends[0].sockmap
    found.apply(policy.replace("PORT", "http"))
    one, direct = entry(found, "10.96.0.1|80"), entry(found, "10.0.0.1|8080")
    assert (one.http, one.backends[0].sockmap) == (True, False)
    # Who asks the pod itself must speak TLS.
    assert (direct.http, direct.backends[0].sockmap) == (False, False)
    found.delete("BackendTLSPolicy", "tls")
    assert entry(found, "10.0.0.1|8080").backends[0].sockmap


def test_entries_of_pods_follow_slices_services_and_pods() -> None:
    found = world(service("s", HTTP), piece("s", "10.0.0.1 10.0.0.2"), pod())
    assert list(found.of("entry")) == ["entry/10.96.0.1|80/TCP", "entry/10.0.0.1|8080/TCP"]
    found.apply(pod("q", "10.0.0.2"))
    assert entry(found, "10.0.0.2|8080").source == "Pod/default/q"
    found.apply(piece("s", "10.0.0.2"))
    assert "entry/10.0.0.1|8080/TCP" not in found.sections
    found.apply(service("s", "{name: http, port: 80, appProtocol: tcp}"))
    assert not entry(found, "10.0.0.2|8080").http
    found.delete("Service", "s")
    assert found.of("entry") == {}


def test_a_change_of_one_endpoint_touches_one_entry() -> None:
    addresses = " ".join(f"10.0.0.{n}" for n in range(1, 60))
    found = world(
        service("s", HTTP),
        piece("s", addresses),
        *(pod(f"p{n}", f"10.0.0.{n}") for n in range(1, 61)),
    )
    before = dict(found.sections)
    found.apply(piece("s", f"{addresses} 10.0.0.60"))
    changed = {key for key, one in found.sections.items() if before.get(key) is not one}
    assert changed == {
        "entry/10.0.0.60|8080/TCP",
        "entry/10.96.0.1|80/TCP",
        "cluster/Service/default/s/80",
    }


def test_without_a_mesh_entries_are_as_they_were() -> None:
    found = world(BACKEND, pod("backend-a"), pod("b", "10.0.0.2", node="n2"), options=Options())
    assert {key: plain(one)["backends"] for key, one in found.of("entry").items()} == {
        "entry/10.96.0.7|80/TCP": [
            {"address": "10.0.0.1", "port": 8080},
            {"address": "10.0.0.2", "port": 8080},
        ]
    }
    assert found.of("service") == found.of("cluster") == {}
