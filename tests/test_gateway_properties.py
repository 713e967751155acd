"""Whatever the order and the steps in which objects and answers come, the same tables follow; and
an added route costs its own work only."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.addresses import Request, allocate, pool_of
from gateway.control import ControlPlane, Options
from gateway.hostnames import covers, intersection
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from tests.gateway_world import (
    BACKEND,
    CLASS,
    GATEWAY,
    ROUTE,
    World,
    ca_config_map,
    join,
    objects,
    tls_secret,
)

# A world in which most things refer to, conflict with or depend on others.
SCENE = join(
    CLASS,
    "kind: GatewayClass\nmetadata: {name: other}\nspec: {controllerName: example.com/other}",
    "kind: Namespace\nmetadata: {name: apps, labels: {team: a}}",
    GATEWAY
    + """
  allowedListeners: {namespaces: {from: All}}
  tls: {backend: {clientCertificateRef: {name: cert}}}
""",
    """
kind: Gateway
metadata: {name: second, creationTimestamp: '2024-01-01T00:00:00Z'}
spec:
  gatewayClassName: weft
  defaultScope: All
  addresses: [{value: 127.9.0.2}, {}]
  tls: {frontend: {default: {validation: {caCertificateRefs:
    [{group: '', kind: ConfigMap, name: ca}]}}}}
  listeners:
  - {name: http, port: 80, protocol: HTTP, hostname: "*.example.com"}
  - name: https
    port: 443
    protocol: HTTPS
    tls: {certificateRefs: [{name: cert}, {name: cert, namespace: apps}]}
    allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: a}}}}
""",
    GATEWAY.replace("name: gw", "name: third") + "  addresses: [{value: 127.9.0.2}]",
    GATEWAY.replace("name: gw", "name: theirs").replace("weft", "other"),
    """
kind: ListenerSet
metadata: {name: set, namespace: apps}
spec:
  parentRef: {name: gw, namespace: default}
  listeners:
  - {name: a, port: 80, protocol: HTTP}
  - {name: b, port: 8080, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}
""",
    """
kind: ListenerSet
metadata: {name: rival, namespace: apps, creationTimestamp: '2024-01-01T00:00:00Z'}
spec:
  parentRef: {name: gw, namespace: default}
  listeners: [{name: b, port: 8080, protocol: HTTP}]
""",
    tls_secret("cert"),
    tls_secret("cert", namespace="apps"),
    ca_config_map("ca"),
    """
kind: ReferenceGrant
metadata: {name: grant, namespace: apps}
spec:
  from:
  - {group: gateway.networking.k8s.io, kind: Gateway, namespace: default}
  - {group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: default}
  to: [{group: "", kind: Secret}, {group: "", kind: Service}]
""",
    BACKEND,
    BACKEND.replace("{name: backend}", "{name: backend, namespace: apps}").replace(
        "  name: backend-1", "  name: backend-1\n  namespace: apps"
    ),
    ROUTE,
    """
kind: HTTPRoute
metadata: {name: wide, creationTimestamp: '2024-01-03T00:00:00Z'}
spec:
  useDefaultGateways: All
  parentRefs: [{name: gw}, {name: third}, {kind: ListenerSet, name: set, namespace: apps}]
  hostnames: [a.example.com, "*.test"]
  rules:
  - backendRefs: [{name: backend, port: 80}, {name: backend, namespace: apps, port: 80}]
    filters:
    - {type: RequestMirror, requestMirror: {backendRef: {name: backend, port: 80}}}
""",
    """
kind: GRPCRoute
metadata: {name: rpc, creationTimestamp: '2024-01-02T00:00:00Z'}
spec:
  parentRefs: [{name: gw}, {name: second}]
  hostnames: [a.example.com]
  rules: [{matches: [{method: {service: a.B}}], backendRefs: [{name: backend, port: 80}]}]
""",
    """
kind: BackendTLSPolicy
metadata: {name: tls}
spec:
  targetRefs: [{group: "", kind: Service, name: backend}]
  validation: {hostname: b.test, caCertificateRefs: [{group: "", kind: ConfigMap, name: ca}]}
""",
    """
kind: BackendTLSPolicy
metadata: {name: tls-2}
spec:
  targetRefs: [{group: "", kind: Service, name: backend, sectionName: http}]
  validation: {hostname: c.test, wellKnownCACertificates: System}
""",
    """
kind: Namespace
metadata: {name: default, annotations: {weft.dev/mtls: strict}}
""",
    """
kind: Pod
metadata: {name: backend-a, labels: {app: a}, annotations: {weft.dev/sockmap: maybe}}
spec: {nodeName: n1}
status: {podIP: 10.0.0.1}
""",
    """
kind: Node
metadata: {name: former, creationTimestamp: '2024-01-01T00:00:00Z'}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}
""",
    """
kind: BackendTLSPolicy
metadata: {name: for-nothing}
spec:
  targetRefs: [{group: '', kind: Service, name: gone}]
  validation: {hostname: c.test, wellKnownCACertificates: System}
""",
    """
kind: Node
metadata: {name: n2, creationTimestamp: '2024-01-02T00:00:00Z'}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}
""",
    """
kind: Pod
metadata: {name: heir, labels: {app: b}, creationTimestamp: '2024-01-01T00:00:00Z'}
spec: {nodeName: n2}
status: {podIPs: [{ip: 10.0.0.1}, {ip: 10.0.0.2}]}
""",
    """
kind: Service
metadata: {name: rival}
spec:
  clusterIP: 10.96.0.7
  clusterIPs: [10.96.0.7, 10.96.0.8]
  ports: [{name: tcp, port: 8080}, {name: http, port: 80, appProtocol: kubernetes.io/h2c}]
""",
    """
kind: EndpointSlice
metadata: {name: rival-1, labels: {kubernetes.io/service-name: rival}}
addressType: IPv4
ports: [{name: tcp, port: 8080}]
endpoints: [{addresses: [10.0.0.2]}]
""",
    """
kind: HTTPRoute
metadata:
  name: mesh
  creationTimestamp: '2024-01-01T00:00:00Z'
  annotations: {weft.dev/client-headers: maybe}
spec:
  parentRefs: [{group: '', kind: Service, name: backend}, {group: '', kind: Service, name: rival}]
  rules: [{backendRefs: [{name: backend, port: 80}]}]
""",
    """
kind: HTTPRoute
metadata: {name: mesh, namespace: apps}
spec:
  parentRefs: [{group: '', kind: Service, name: rival, namespace: default, port: 80}]
  rules: [{backendRefs: [{name: rival, namespace: default, port: 8080}]}]
""",
    """
kind: GRPCRoute
metadata: {name: mesh}
spec:
  parentRefs: [{group: '', kind: Service, name: rival}]
  rules: [{backendRefs: [{name: rival, port: 80}]}]
""",
    """
kind: Pod
metadata: {name: judged, labels: {app: a, tier: web}}
spec:
  nodeName: n1
  containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]
status: {podIP: 10.0.0.9}
""",
    """
kind: Pod
metadata: {name: asker, namespace: apps, labels: {app: c}}
spec:
  nodeName: n1
  serviceAccountName: asker
  containers: [{name: c, ports: [{name: http, containerPort: 8081}]}]
status: {podIP: 10.0.0.10}
""",
    """
kind: EndpointSlice
metadata: {name: kubernetes, labels: {kubernetes.io/service-name: kubernetes}}
addressType: IPv4
ports: [{name: https, port: 6443}]
endpoints: [{addresses: [192.0.2.2]}, {addresses: [192.0.2.9]}]
""",
    """
kind: NetworkPolicy
metadata: {name: np, annotations: {weft.dev/policy-audit: maybe}}
spec:
  podSelector: {matchLabels: {app: a}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {team: a}}
    - ipBlock: {cidr: 192.0.2.0/24, except: [192.0.2.0/28]}
    ports: [{port: http}]
  egress:
  - to: [{podSelector: {}}]
    ports: [{port: http}, {port: 53, protocol: UDP}]
""",
    """
kind: CiliumNetworkPolicy
metadata: {name: cnp, namespace: apps}
spec:
  endpointSelector: {matchExpressions: [{key: app, operator: In, values: [c, d]}]}
  egress:
  - toServices: [{k8sService: {serviceName: rival, namespace: default}}]
  - toServices: [{k8sServiceSelector: {selector: {matchLabels: {app: x}}}}]
  - toEntities: [kube-apiserver, remote-node]
  - toCIDR: [192.0.2.8/29]
  - toEndpoints: [{matchLabels: {"k8s:io.kubernetes.pod.namespace": default, tier: web}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{path: /a}]}}]
  ingress:
  - authentication: {mode: required}
    toPorts: [{ports: [{port: main}, {port: "8080", endPort: 8081}]}]
""",
    """
kind: CiliumClusterwideNetworkPolicy
metadata: {name: ccnp}
specs:
- endpointSelector: {}
  ingressDeny: [{fromEntities: [world]}]
  ingress: [{fromEndpoints: [{}], fromRequires: [{matchLabels: {app: c}}]}]
- endpointSelector: {matchLabels: {app: b}}
  egress: [{toFQDNs: [{matchName: a.example}]}]
""",
)
PARTS = [(kind, key, obj) for kind, found in objects(SCENE).items() for key, obj in found.items()]
OPTIONS = Options(
    addresses=("127.9.0.0/29",),
    advertise=("192.0.2.1",),
    node="n1",
    mesh_addresses=("127.9.0.1",),
)
ANSWERS: list[tuple[str, Any]] = [
    ("binds", {("127.9.0.2", 80): "in use"}),
    ("binds", {("127.9.0.2", 443): ""}),
    ("binds", {("127.9.0.1", 15001): "in use"}),
    ("refusals", {"route/HTTPRoute/default/route": "no"}),
    ("refusals", {"policy/default/judged": "no"}),
    ("refusals", {"cluster/Service/default/backend/80": "no"}),
]


def feed(steps: list[Any]) -> ControlPlane:
    control = ControlPlane(OPTIONS)
    for step in steps:
        if len(step) == 2:
            outcome = control.apply({}, **{step[0]: step[1]})
        else:
            kind, key, obj = step
            outcome = control.apply({kind: {key: obj}})
        assert not outcome.failures
    return control


def test_the_scene_has_something_of_everything() -> None:
    tables = feed([*PARTS, *ANSWERS])._derivation.tables
    assert [name for name, table in tables.items() if not table] == []


@settings(max_examples=40, deadline=None)
@given(st.permutations([*PARTS, *ANSWERS]), st.sets(st.sampled_from(range(len(PARTS)))))
def test_order_and_detours_do_not_matter(order: list[Any], detours: set[int]) -> None:
    """Objects in any order; some of them come, go, and come back at the end."""
    gone = [PARTS[number] for number in sorted(detours)]
    steps = [*order, *((kind, key, None) for kind, key, _ in gone), *gone]
    control = feed(steps)
    straight = feed([*PARTS, *ANSWERS])
    assert control._derivation.tables == straight._derivation.tables
    assert control._derivation.indexes == straight._derivation.indexes


@settings(max_examples=25, deadline=None)
@given(st.permutations(PARTS))
def test_changes_add_up(order: list[Any]) -> None:
    """What apply reports, replayed, is what there is; and nothing is left when everything goes."""
    world = World(OPTIONS)
    for kind, key, obj in order:
        world.change({kind: {key: obj}})
    tables = world.control._derivation.tables
    assert len(world.of("route")) == len(tables["sections"])
    assert len(world.of("cluster")) == len(tables["clusters"])
    assert len(world.statuses) == sum(
        len(table) for name, table in tables.items() if name.endswith("_status")
    )
    for kind, key, _ in reversed(order):
        world.change({kind: {key: None}})
    ports = ["port/127.9.0.1|15001", "port/127.9.0.1|15002"]
    assert sorted(world.sections) == [*ports, "settings"]
    assert not world.statuses
    left = {name for name, table in world.control._derivation.tables.items() if table}
    # allocation is keyed by the one bucket of all requests, which is gone too.
    assert left <= {"binds"}


def test_an_added_route_costs_its_own_work_only() -> None:
    """Counted, not timed: how many values are computed for one more route, at 20 and at 400."""

    def added(there: int) -> Counter[str]:
        world = World()
        world.apply(join(GATEWAY, BACKEND))
        route = objects(ROUTE)["HTTPRoute"][ObjectKey("default", "route")]
        world.change(
            {"HTTPRoute": {ObjectKey("default", f"r{number}"): route for number in range(there)}}
        )
        calls: Counter[str] = Counter()
        derivation = world.control._derivation

        def counted(rule: Any) -> Any:
            def compute(view: View, key: Any) -> Any:
                calls[rule.name] += 1
                return rule.compute(view, key)

            return rule._replace(compute=compute)

        derivation._rules = tuple(map(counted, derivation._rules))
        world.change({"HTTPRoute": {ObjectKey("default", "new"): route}})
        assert world.attached("http") == there + 1
        return calls

    few, many = added(20), added(400)
    assert few == many
    assert sum(few.values()) < 12


# --- hostnames ------------------------------------------------------------------------------------

LABELS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map(".".join)
NAMES = LABELS | LABELS.map("*.".__add__) | st.just("*")


def matches(pattern: str, host: str) -> bool:
    """The specification's sentence on wildcards, restated."""
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and len(host) > len(pattern[1:])
    return host == pattern


@given(NAMES, st.lists(NAMES, max_size=3), LABELS)
def test_intersection_serves_exactly_the_common_hosts(
    listener: str, route: list[str], host: str
) -> None:
    common = intersection(None if listener == "*" else listener, route)
    served = any(matches(name, host) for name in common)
    wanted = matches(listener, host) and any(matches(name, host) for name in route or ["*"])
    assert served == wanted


@given(NAMES, NAMES, LABELS)
def test_covers(wide: str, narrow: str, host: str) -> None:
    if covers(wide, narrow) and matches(narrow, host):
        assert matches(wide, host)
    assert covers(wide, wide)


# --- addresses ------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.builds(
        Request,
        st.sampled_from(["2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z"]),
        st.builds(ObjectKey, st.just("ns"), st.sampled_from("abcdef")),
        st.lists(st.sampled_from(["", "", "127.9.0.2", "10.9.9.9"]), min_size=1, max_size=2).map(
            tuple
        ),
        st.sampled_from([("127.9.0.0/29", "fd00::1"), ("127.9.0.0/30",)]),
    ),
    unique_by=lambda request: request.key,
    max_size=6,
)


@given(REQUESTS)
def test_allocation_is_stable_and_gives_no_address_twice(requests: list[Request]) -> None:
    given_addresses = allocate(requests)
    assert given_addresses == allocate(list(reversed(requests)))
    assigned = [
        (request.pool, address)
        for request in requests
        for wanted, address in zip(request.wanted, given_addresses[request.key], strict=True)
        if not wanted and address is not None
    ]
    assert len(assigned) == len({address for _, address in assigned})
    assert all(address in pool_of(pool) for pool, address in assigned)
    # The younger can go without moving the older.
    older = [request for request in requests if request.created == "2024-01-01T00:00:00Z"]
    assert allocate(older).items() <= given_addresses.items()
