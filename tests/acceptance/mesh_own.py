"""Mesh tests that the suite has no like of: what Weft promises beyond it, and what its tests cannot
see because they are content with any backend and with port 80."""

from __future__ import annotations

from acceptance.cases import Case, Json
from acceptance.mesh_cases import IS_SET, MESH, request, response_header, route, service

PROFILE = "WEFT-MESH"
_CONSUMER = "gateway-conformance-mesh-consumer"
_ECHO = {"app": "app=echo,version=v1", "namespace": MESH}
_CONSUMER_ECHO = {"app": "app=echo,version=v1", "namespace": _CONSUMER}
# Enough that each of four backends is among the answers, but for one time in 20 million.
_REQUESTS = 64
_BOTH = ("echo-v1", "echo-v2")


def _spread(protocol: str, host: str, client: Json) -> Json:
    """A step: no request of many fails, and every pod of these Deployments answers some."""
    return {
        "op": "spread",
        "protocol": protocol,
        "host": host,
        "client": client,
        "requests": _REQUESTS,
        "backends": _BOTH,
    }


def _case(name: str, objects: tuple[Json, ...], *steps: Json) -> Case:
    return Case(name, (PROFILE,), ("Mesh", "HTTPRoute"), (), steps, objects, own=True)


def _to_v1(**more: object) -> Json:
    return {"backendRefs": [{"name": "echo-v1", "namespace": MESH, "port": 80}], **more}


def _every_backend() -> Case:
    """Near or far, each pod of a Service gets requests, and none is lost on the way."""
    return _case(
        "WeftMeshEveryBackend",
        (),
        _spread("http", "echo", _ECHO),
        _spread("http", f"echo.{MESH}", _CONSUMER_ECHO),
        _spread("grpc", "echo:7070", _ECHO),
    )


def _other_ports() -> Case:
    """A route of one port leaves the others alone: TLS and TCP go through as bytes."""
    return _case(
        "WeftMeshOtherPorts",
        (route("weft-port", service("echo", port=80), [_to_v1()]),),
        request(),
        _spread("tls", "echo:443", _ECHO),
        _spread("tcp", "echo:9090", _ECHO),
        _spread("http", "echo:8080", _ECHO),
    )


def _section_name() -> Case:
    """A Service's parentRef.sectionName is the name of its port (ParentReference.sectionName)."""
    rule = _to_v1(filters=[response_header("X-Header-Set", "set")])
    return _case(
        "WeftMeshSectionName",
        (route("weft-section", service("echo-v1", sectionName="http-alt"), [rule]),),
        request(host="echo-v1:8080", response=IS_SET),
        request(host="echo-v1", response={"AbsentHeaders": ["X-Header-Set"]}),
    )


def _consumer_instead_of_producer() -> Case:
    """In the consumer's namespace its routes count instead of the producer's, not beside them
    (GEP-1294)."""

    def made_by(who: str, namespace: str, path: str) -> Json:
        rule = _to_v1(
            matches=[{"path": {"type": "PathPrefix", "value": path}}],
            filters=[response_header("X-Header-Set", who)],
        )
        parent = service("echo-v1", namespace=MESH)
        return route(f"weft-{who}", parent, [rule], namespace=namespace)

    def is_set(by: str) -> Json:
        return {"Headers": {"X-Header-Set": by}}

    none = {"StatusCodes": [404]}
    host = f"echo-v1.{MESH}"
    return _case(
        "WeftMeshConsumerInsteadOfProducer",
        (made_by("producer", MESH, "/p"), made_by("consumer", _CONSUMER, "/c")),
        request("/c", host=host, response=is_set("consumer"), client=_CONSUMER_ECHO),
        request("/p", host=host, response=none, client=_CONSUMER_ECHO),
        request("/p", host=host, response=is_set("producer")),
        request("/c", host=host, response=none),
    )


def _client_headers() -> Case:
    """The backend is told who asks where the route wants that, whatever the client claims."""
    told = route("weft-client", service("echo", port=80), [_to_v1()])
    told["metadata"]["annotations"] = {"weft.dev/client-headers": "true"}
    step = request(headers={"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Client-Cert": "URI=me"})
    step["case"]["ExpectedRequest"] = {
        "Request": {
            "Headers": {
                "X-Forwarded-For": "__CLIENT_ADDRESS__",
                "X-Forwarded-Client-Cert": f"URI=spiffe://cluster.local/ns/{MESH}/sa/default",
            }
        }
    }
    return _case("WeftMeshClientHeaders", (told,), step)


def own_mesh_cases() -> list[Case]:
    return [
        _every_backend(),
        _other_ports(),
        _section_name(),
        _consumer_instead_of_producer(),
        _client_headers(),
    ]
