"""Manifests for every check: one that it accepts and one that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mesh.model.decode import KINDS

Manifest = dict[str, Any]
CONDITION = {
    "type": "Accepted",
    "status": "True",
    "reason": "Accepted",
    "message": "",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
}


def manifest(kind: str, spec: Any = None, **more: Any) -> Manifest:
    group = next(g for g, k in KINDS if k == kind)
    version = "cilium.io/v2" if group == "cilium.io" else f"{group}/v1" if group else "v1"
    whole = {"apiVersion": version, "kind": kind, "metadata": {"name": "one"}, **more}
    return whole if spec is None else {**whole, "spec": spec}


def http(*rules: Any, **spec: Any) -> Manifest:
    return manifest("HTTPRoute", {**({"rules": list(rules)} if rules else {}), **spec})


def grpc(*rules: Any, **spec: Any) -> Manifest:
    return manifest("GRPCRoute", {"rules": list(rules), **spec})


def path(value: str, type: str = "PathPrefix") -> Manifest:
    return http({"matches": [{"path": {"type": type, "value": value}}]})


def listener(name: str = "a", port: int = 80, protocol: str = "HTTP", **more: Any) -> Manifest:
    return {"name": name, "port": port, "protocol": protocol, **more}


def gateway(*listeners: Any, **spec: Any) -> Manifest:
    return manifest(
        "Gateway",
        {"gatewayClassName": "weft", "listeners": list(listeners) or [listener()], **spec},
    )


def listener_set(*listeners: Any) -> Manifest:
    return manifest("ListenerSet", {"parentRef": {"name": "gw"}, "listeners": list(listeners)})


def policy(targets: Any = None, **validation: Any) -> Manifest:
    validation.setdefault("hostname", "a.example")
    if not validation.pop("bare", False):
        validation.setdefault("wellKnownCACertificates", "System")
    targets = targets or [{"group": "", "kind": "Service", "name": "s"}]
    return manifest("BackendTLSPolicy", {"targetRefs": targets, "validation": validation})


def service(*ports: Any, **spec: Any) -> Manifest:
    return manifest("Service", {"ports": list(ports), **spec})


def endpoints(type: str = "IPv4", *addresses: str, **more: Any) -> Manifest:
    found = [{"addresses": list(addresses)}] if addresses else []
    return manifest("EndpointSlice", **{"addressType": type, "endpoints": found, **more})


SERVICE = {"name": "s", "port": 80}
PORTLESS = {"name": "s"}
HEADERS = {"set": [{"name": "x", "value": "y"}]}
REDIRECT = {"type": "RequestRedirect", "requestRedirect": {"scheme": "https"}}
REWRITE = {"type": "URLRewrite", "urlRewrite": {"hostname": "a.example"}}
CORS = {"type": "CORS", "cors": {"allowOrigins": ["*"]}}
FILTERS: dict[str, tuple[str, Any]] = {
    "RequestHeaderModifier": ("requestHeaderModifier", HEADERS),
    "ResponseHeaderModifier": ("responseHeaderModifier", HEADERS),
    "RequestMirror": ("requestMirror", {"backendRef": SERVICE}),
    "RequestRedirect": ("requestRedirect", {"scheme": "https"}),
    "URLRewrite": ("urlRewrite", {"hostname": "a.example"}),
    "ExtensionRef": ("extensionRef", {"group": "a.b", "kind": "C", "name": "d"}),
    "CORS": ("cors", {}),
    "ExternalAuth": ("externalAuth", {"protocol": "HTTP", "http": {}, "backendRef": SERVICE}),
}
GRPC_FILTERS = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "ExtensionRef")


def filter(kind: str) -> Manifest:
    name, value = FILTERS[kind]
    return {"type": kind, name: value}


def http_filter(*filters: Any) -> Manifest:
    return http({"filters": list(filters)})


def prefix(kind: str, match: str = "PathPrefix", count: int = 1, backend: bool = False) -> Manifest:
    name, _ = FILTERS[kind]
    modifier = {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/b"}}
    filters = [{"type": kind, name: modifier}]
    matches = [{"path": {"type": match, "value": f"/a{index}"}} for index in range(count)]
    if backend:
        return http({"matches": matches, "backendRefs": [{**SERVICE, "filters": filters}]})
    return http({"matches": matches, "filters": filters})


def modified(kind: str, **path: Any) -> Manifest:
    return http_filter({"type": "URLRewrite", "urlRewrite": {"path": {"type": kind, **path}}})


def auth(protocol: str, **more: Any) -> Manifest:
    value = {"protocol": protocol, "backendRef": SERVICE, **more}
    return http_filter({"type": "ExternalAuth", "externalAuth": value})


def mirror(route: Callable[..., Manifest], **more: Any) -> Manifest:
    value = {"backendRef": SERVICE, **more}
    return route({"filters": [{"type": "RequestMirror", "requestMirror": value}]})


def cors(**more: Any) -> Manifest:
    return http_filter({"type": "CORS", "cors": more})


def matches(count: int) -> list[Any]:
    return [{"headers": [{"name": "x", "value": str(index)}]} for index in range(count)]


class Case(NamedTuple):
    """`bad` breaks `rule` (its beginning) at `where`; `good` breaks nothing."""

    rule: str
    good: Manifest
    bad: Manifest
    where: str


def pod(**status: Any) -> Manifest:
    return manifest("Pod", status=status)


def peer(**value: Any) -> Manifest:
    return manifest("NetworkPolicy", {"ingress": [{"from": [value]}]})


def policy_port(**value: Any) -> Manifest:
    return manifest("NetworkPolicy", {"egress": [{"ports": [value]}]})


def cilium(kind: str = "CiliumNetworkPolicy", **spec: Any) -> Manifest:
    return manifest(kind, {"endpointSelector": {}, **spec})


def node(*addresses: Manifest) -> Manifest:
    return manifest("Node", status={"addresses": list(addresses)})


GW, GW_A, GW_B = {"name": "gw"}, {"name": "gw", "sectionName": "a"}, {"name": "gw", "port": 80}
TLS = {"certificateRefs": [{"name": "c"}]}
TARGET = {"group": "", "kind": "Service", "name": "s"}
HOSTNAME_RULE = "Hostname value must"


def status_address(type: str, value: str) -> Manifest:
    return {**gateway(), "status": {"addresses": [{"type": type, "value": value}]}}


CASES = [
    # Parents and backends.
    *(
        case
        for route in (http, grpc)
        for case in (
            Case(
                "sectionName or port must be specified when parentRefs",
                route(parentRefs=[GW_A, {"name": "gw", "sectionName": "b"}, {"name": "other"}]),
                route(parentRefs=[GW, GW_A]),
                "spec.parentRefs",
            ),
            Case(
                "sectionName or port must be specified when parentRefs",
                route(parentRefs=[GW, {**GW, "namespace": "other"}]),
                route(parentRefs=[GW_A, {**GW_A, "port": 80}]),
                "spec.parentRefs",
            ),
            Case(
                "sectionName or port must be unique when parentRefs",
                route(parentRefs=[GW_B, {"name": "gw", "port": 81}]),
                route(parentRefs=[GW_B, GW_B]),
                "spec.parentRefs",
            ),
            Case(
                "While 16 rules and 64 matches per rule are allowed",
                route({"matches": matches(64)}, {"matches": matches(64)}),
                route({"matches": matches(64)}, {"matches": matches(64)}, {"matches": matches(1)}),
                "spec.rules",
            ),
            Case(
                "Rule name must be unique within the route",
                route({"name": "a"}, {"name": "b"}, {}, {}),
                route({"name": "a"}, {}, {"name": "a"}),
                "spec.rules",
            ),
            Case(
                "Must have port for Service reference",
                route({"backendRefs": [SERVICE, {"group": "a.b", "kind": "C", "name": "d"}]}),
                route({"backendRefs": [SERVICE, PORTLESS]}),
                "spec.rules[0].backendRefs[1]",
            ),
        )
    ),
    # Filters and the rules they stand in.
    Case(
        "RequestRedirect filter must not be used together with backendRefs",
        http({"filters": [REDIRECT]}, {"backendRefs": [SERVICE]}),
        http({"filters": [REDIRECT], "backendRefs": [SERVICE]}),
        "spec.rules[0]",
    ),
    *(
        Case(
            f"{rule} {kind} filter with path.replacePrefixMatch, exactly one PathPrefix",
            prefix(kind, backend=backend),
            bad,
            "spec.rules[0]",
        )
        for kind, backend, rule in (
            ("RequestRedirect", False, "When using"),
            ("URLRewrite", False, "When using"),
            ("RequestRedirect", True, "Within backendRefs, when using"),
            ("URLRewrite", True, "Within backendRefs, When using"),
        )
        for bad in (
            prefix(kind, "Exact", backend=backend),
            prefix(kind, count=2, backend=backend),
        )
    ),
    *(
        case
        for route, kinds in ((http, tuple(FILTERS)), (grpc, GRPC_FILTERS))
        for kind in kinds
        for other in ("ExtensionRef" if kind != "ExtensionRef" else "RequestMirror",)
        for case in (
            Case(
                f"filter.{FILTERS[kind][0]} must be nil if the filter.type is not {kind}",
                route({"filters": [filter(kind)]}),
                route({"filters": [filter(kind) | filter(other)]}),
                "spec.rules[0].filters[0]",
            ),
            Case(
                f"filter.{FILTERS[kind][0]} must be specified for {kind} filter.type",
                route({"filters": [filter(kind)]}),
                route({"backendRefs": [{**SERVICE, "filters": [{"type": kind}]}]}),
                "spec.rules[0].backendRefs[0].filters[0]",
            ),
        )
    ),
    *(
        case
        for route, kinds in (
            (
                http,
                (*GRPC_FILTERS[:2], "RequestRedirect", "URLRewrite", "CORS"),
            ),
            (grpc, GRPC_FILTERS[:2]),
        )
        for kind in kinds
        for case in (
            Case(
                f"{kind} filter cannot be repeated",
                route(
                    {"filters": [filter("RequestMirror"), filter(kind), filter("RequestMirror")]}
                ),
                route({"filters": [filter(kind), filter("RequestMirror"), filter(kind)]}),
                "spec.rules[0].filters",
            ),
            Case(
                f"{kind} filter cannot be repeated",
                route({"backendRefs": [{**SERVICE, "filters": [filter(kind)]}]}),
                route({"backendRefs": [{**SERVICE, "filters": [filter(kind), filter(kind)]}]}),
                "spec.rules[0].backendRefs[0].filters",
            ),
        )
    ),
    Case(
        "May specify either httpRouteFilterRequestRedirect or httpRouteFilterRequestRewrite",
        http_filter(REWRITE),
        http_filter(REDIRECT, REWRITE),
        "spec.rules[0].filters",
    ),
    Case(
        "May specify either httpRouteFilterRequestRedirect or httpRouteFilterRequestRewrite",
        http({"backendRefs": [{**SERVICE, "filters": [REWRITE]}]}),
        http({"backendRefs": [{**SERVICE, "filters": [REDIRECT, REWRITE]}]}),
        "spec.rules[0].backendRefs[0].filters",
    ),
    *(
        case
        for route in (http, grpc)
        for case in (
            Case(
                "Must have port for Service reference",
                mirror(route),
                mirror(route, backendRef=PORTLESS),
                "spec.rules[0].filters[0].requestMirror.backendRef",
            ),
            Case(
                "Only one of percent or fraction may be specified",
                mirror(route, percent=0),
                mirror(route, percent=0, fraction={"numerator": 1}),
                "spec.rules[0].filters[0].requestMirror",
            ),
            Case(
                "numerator must be less than or equal to denominator",
                mirror(route, fraction={"numerator": 100}),
                mirror(route, fraction={"numerator": 101}),
                "spec.rules[0].filters[0].requestMirror.fraction",
            ),
        )
    ),
    *(
        Case(
            f"{field[0].upper()}{field[1:]} cannot contain '*' alongside other",
            cors(**{field: ["*"]}),
            cors(**{field: ["*", other]}),
            f"spec.rules[0].filters[0].cors.{field}",
        )
        for field, other in (
            ("allowHeaders", "x-a"),
            ("allowMethods", "GET"),
            ("allowOrigins", "https://a.example"),
        )
    ),
    *(
        case
        for kind, other in (("GRPC", "HTTP"), ("HTTP", "GRPC"))
        for case in (
            Case(
                f"{kind.lower()} must be specified when protocol is set to '{kind}'",
                auth(kind, **{kind.lower(): {}}),
                auth(kind),
                "spec.rules[0].filters[0].externalAuth",
            ),
            Case(
                f"protocol must be '{kind}' when {kind.lower()} is set",
                auth(kind, **{kind.lower(): {}}),
                auth(other, grpc={}, http={}),
                "spec.rules[0].filters[0].externalAuth",
            ),
        )
    ),
    *(
        case
        for kind, field, other in (
            ("ReplaceFullPath", "replaceFullPath", "replacePrefixMatch"),
            ("ReplacePrefixMatch", "replacePrefixMatch", "replaceFullPath"),
        )
        for case in (
            Case(
                f"{field} must be specified when type is set to '{kind}'",
                modified("ReplaceFullPath", replaceFullPath=""),
                modified(kind),
                "spec.rules[0].filters[0].urlRewrite.path",
            ),
            Case(
                f"type must be '{kind}' when {field} is set",
                prefix("URLRewrite"),
                modified(f"R{other[1:]}", replaceFullPath="/", replacePrefixMatch="/"),
                "spec.rules[0].filters[0].urlRewrite.path",
            ),
        )
    ),
    # Matches.
    Case(
        "value must be an absolute path and start with '/'",
        path("a", "RegularExpression"),
        path("a"),
        "spec.rules[0].matches[0].path",
    ),
    *(
        Case(rule, path("/a.b%20c", "Exact"), path(value), "spec.rules[0].matches[0].path")
        for rule, value in (
            ("must not contain '//'", "/a//b"),
            ("must not contain '/./'", "/a/./b"),
            ("must not contain '/../'", "/a/../b"),
            ("must not contain '%2f'", "/a%2fb"),
            ("must not contain '%2F'", "/a%2Fb"),
            ("must not contain '#'", "/a#b"),
            ("must not end with '/..'", "/a/.."),
            ("must not end with '/.'", "/a/."),
            ("must only contain valid characters (matching ^(?:", "/a b"),
            ("must only contain valid characters (matching ^(?:", "/a%2"),
            ("must only contain valid characters (matching ^(?:", "/a\n"),
        )
    ),
    Case(
        "One or both of 'service' or 'method' must be specified",
        grpc({"matches": [{"method": {"method": "m"}}]}),
        grpc({"matches": [{}, {"method": {}}]}),
        "spec.rules[0].matches[1].method",
    ),
    *(
        Case(
            f"{field} must only contain valid characters",
            grpc({"matches": [{"method": {"type": kind, field: good}}]}),
            grpc({"matches": [{"method": {field: bad}}]}),
            "spec.rules[0].matches[0].method",
        )
        for field, kind, good, bad in (
            ("service", "Exact", "Foo.bar_1.Baz", "foo/bar"),
            ("service", "RegularExpression", "foo/.*", "foo..bar"),
            ("method", "Exact", "Get_1", "1get"),
            ("method", "RegularExpression", "Get.*", "Get.One"),
        )
    ),
    # Sessions and timeouts.
    *(
        case
        for route in (http, grpc)
        for case in (
            Case(
                "AbsoluteTimeout must be specified when cookie lifetimeType is Permanent",
                route(
                    {
                        "sessionPersistence": {
                            "absoluteTimeout": "1h",
                            "cookieConfig": {"lifetimeType": "Permanent"},
                        }
                    }
                ),
                route({"sessionPersistence": {"cookieConfig": {"lifetimeType": "Permanent"}}}),
                "spec.rules[0].sessionPersistence",
            ),
            Case(
                "cookieConfig can only be set with type Cookie",
                route({"sessionPersistence": {"cookieConfig": {}}}),
                route({"sessionPersistence": {"type": "Header", "cookieConfig": {}}}),
                "spec.rules[0].sessionPersistence",
            ),
        )
    ),
    Case(
        "backendRequest timeout cannot be longer than request timeout",
        http({"timeouts": {"request": "1s", "backendRequest": "1000ms"}}),
        http({"timeouts": {"request": "1s", "backendRequest": "1001ms"}}),
        "spec.rules[0].timeouts",
    ),
    Case(
        "backendRequest timeout cannot be longer than request timeout",
        http({"timeouts": {"request": "0s", "backendRequest": "1s"}}),
        http({"timeouts": {"request": "1h", "backendRequest": "61m"}}),
        "spec.rules[0].timeouts",
    ),
    # Listeners.
    *(
        case
        for build in (gateway, listener_set)
        for case in (
            Case(
                "tls must not be specified for protocols ['HTTP', 'TCP', 'UDP']",
                build(listener(protocol="example.com/x", tls=TLS)),
                build(listener(tls=TLS)),
                "spec.listeners",
            ),
            Case(
                "tls mode must be Terminate for protocol HTTPS",
                build(listener(protocol="HTTPS", tls=TLS)),
                build(listener(protocol="HTTPS", tls={"mode": "Passthrough"})),
                "spec.listeners",
            ),
            Case(
                "tls mode must be set for protocol TLS",
                build(listener(protocol="TLS", tls={"mode": "Passthrough"})),
                build(listener(protocol="TLS")),
                "spec.listeners",
            ),
            Case(
                "hostname must not be specified for protocols ['TCP', 'UDP']",
                build(listener(hostname="a.example")),
                build(listener(protocol="UDP", hostname="a.example")),
                "spec.listeners",
            ),
            Case(
                "Combination of port, protocol and hostname must be unique",
                build(listener("a"), listener("b", hostname="b.example"), listener("c", 81)),
                build(listener("a"), listener("b", 81), listener("c")),
                "spec.listeners",
            ),
            Case(
                "x-kubernetes-list-map-keys: name",
                build(listener("a"), listener("b", 81)),
                build(listener("a"), listener("a", 81)),
                "spec.listeners[1]",
            ),
            Case(
                "certificateRefs or options must be specified when mode is Terminate",
                build(listener(protocol="HTTPS", tls={"options": {"a": "b"}})),
                build(listener(protocol="HTTPS", tls={})),
                "spec.listeners[0].tls",
            ),
        )
    ),
    *(
        Case(
            f"{kind} values must be unique",
            gateway(addresses=[{"type": kind, "value": one}, {"type": kind}, {"type": kind}]),
            gateway(addresses=[{"type": kind, "value": one}, {"type": kind, "value": one}]),
            "spec.addresses",
        )
        for kind, one in (("IPAddress", "::1"), ("Hostname", "a.example"))
    ),
    *(
        case
        for build, where in (
            (lambda t, v: gateway(addresses=[{"type": t, "value": v}]), "spec.addresses[0]"),
            (status_address, "status.addresses[0]"),
        )
        for case in (
            Case(
                "an IPAddress must be of format ipv4 or ipv6",
                build("IPAddress", "192.0.2.1"),
                build("IPAddress", "192.0.2.256"),
                where,
            ),
            Case(HOSTNAME_RULE, build("Hostname", "*.a.example"), build("Hostname", "A"), where),
        )
    ),
    *(
        case
        for field in ("labels", "annotations")
        for case in (
            Case(
                f"{field[:-1].capitalize()} keys must be in the form of",
                gateway(infrastructure={field: {"a.example/b": "c"}}),
                gateway(infrastructure={field: {"a/b/c": "d"}}),
                f"spec.infrastructure.{field}",
            ),
            Case(
                f"If specified, the {field[:-1]} key's prefix must be",
                gateway(infrastructure={field: {f"{'a' * 252}/b": "c"}}),
                gateway(infrastructure={field: {f"{'a' * 253}/b": "c"}}),
                f"spec.infrastructure.{field}",
            ),
        )
    ),
    Case(
        "x-kubernetes-list-map-keys: port",
        gateway(tls={"frontend": {"default": {}, "perPort": [{"port": 1, "tls": {}}]}}),
        gateway(tls={"frontend": {"default": {}, "perPort": [{"port": 1, "tls": {}}] * 2}}),
        "spec.tls.frontend.perPort[1]",
    ),
    # BackendTLSPolicy.
    Case(
        "sectionName must be specified when targetRefs",
        policy([{**TARGET, "sectionName": "a"}, {**TARGET, "sectionName": "b"}]),
        policy([TARGET, {**TARGET, "sectionName": "b"}]),
        "spec.targetRefs",
    ),
    Case(
        "sectionName must be unique when targetRefs",
        policy([TARGET, {**TARGET, "name": "t"}]),
        policy([TARGET, TARGET]),
        "spec.targetRefs",
    ),
    Case(
        "must not contain both CACertificateRefs and WellKnownCACertificates",
        policy(bare=True, caCertificateRefs=[{"group": "", "kind": "ConfigMap", "name": "ca"}]),
        policy(caCertificateRefs=[{"group": "", "kind": "ConfigMap", "name": "ca"}]),
        "spec.validation",
    ),
    Case(
        "must specify either CACertificateRefs or WellKnownCACertificates",
        policy(),
        policy(bare=True, caCertificateRefs=[]),
        "spec.validation",
    ),
    *(
        case
        for kind, field, good, other in (
            ("Hostname", "hostname", "a.example", {"type": "URI", "uri": "spiffe://a/b"}),
            ("URI", "uri", "spiffe://a/b", {"type": "Hostname", "hostname": "a.example"}),
        )
        for case in (
            Case(
                f"SubjectAltName element must contain {kind}, if Type is set to {kind}",
                policy(subjectAltNames=[{"type": kind, field: good}]),
                policy(subjectAltNames=[{"type": kind}]),
                "spec.validation.subjectAltNames[0]",
            ),
            Case(
                f"SubjectAltName element must not contain {kind}, if Type is not set to {kind}",
                policy(subjectAltNames=[{"type": kind, field: good}]),
                policy(subjectAltNames=[{**other, field: good}]),
                "spec.validation.subjectAltNames[0]",
            ),
        )
    ),
    # List types.
    Case(
        "x-kubernetes-list-type: set",
        http({"retry": {"codes": [500, 503]}}),
        http({"retry": {"codes": [500, 503, 500]}}),
        "spec.rules[0].retry.codes[2]",
    ),
    Case(
        "x-kubernetes-list-map-keys: type",
        {**gateway(), "status": {"conditions": [CONDITION]}},
        {**gateway(), "status": {"conditions": [CONDITION, CONDITION]}},
        "status.conditions[1]",
    ),
    # Kubernetes' own kinds.
    Case(
        "ports are required",
        service(clusterIP="None"),
        service(),
        "spec",
    ),
    Case(
        "externalName must be a DNS name",
        service(type="ExternalName", externalName="a.example."),
        service(type="ExternalName", externalName="-"),
        "spec",
    ),
    Case(
        "externalName must be a DNS name",
        service({"port": 80}),
        service(type="ExternalName"),
        "spec",
    ),
    Case(
        "must be an IP address or None",
        service({"port": 80}, clusterIP="10.0.0.1"),
        service({"port": 80}, clusterIP="10.0.0"),
        "spec.clusterIP",
    ),
    Case(
        "must be IP addresses or None",
        service({"port": 80}, clusterIPs=["10.0.0.1", "fd00::1"]),
        service({"port": 80}, clusterIPs=["10.0.0.1", "x"]),
        "spec.clusterIPs",
    ),
    Case(
        "ports must be named when there are several",
        service({"port": 80}),
        service({"port": 80}, {"port": 81, "name": "b"}),
        "spec.ports",
    ),
    Case(
        "port names must be DNS-1123 labels",
        service({"port": 80, "name": "a-b"}),
        service({"port": 80, "name": "a_b"}),
        "spec.ports",
    ),
    Case(
        "port names must be unique",
        service({"port": 80, "name": "a"}, {"port": 81, "name": "b"}),
        service({"port": 80, "name": "a"}, {"port": 81, "name": "a"}),
        "spec.ports",
    ),
    Case(
        "protocol and port together must be unique",
        service({"port": 80, "name": "a"}, {"port": 80, "name": "b", "protocol": "UDP"}),
        service({"port": 80, "name": "a"}, {"port": 80, "name": "b"}),
        "spec.ports",
    ),
    *(
        Case(
            "targetPort must be 1 to 65535 or a port's name",
            service({"port": 80, "targetPort": good}),
            service({"port": 80, "targetPort": bad}),
            "spec.ports[0]",
        )
        for good, bad in ((65535, 65536), ("http-web", "80"), ("a", "a" * 16), ("a1", "a--b"))
    ),
    *(
        Case(
            "addresses must be of the addressType",
            endpoints(type, good),
            endpoints(type, good, bad),
            "",
        )
        for type, good, bad in (
            ("IPv4", "127.0.0.1", "::1"),
            ("IPv6", "::1", "127.0.0.1"),
            ("FQDN", "a.example", "A"),
        )
    ),
    Case(
        "at most 1000 endpoints",
        endpoints("IPv4", endpoints=[{"addresses": ["127.0.0.1"]}] * 1000),
        endpoints("IPv4", endpoints=[{"addresses": ["127.0.0.1"]}] * 1001),
        "",
    ),
    Case(
        "port names must be unique",
        endpoints("IPv4", ports=[{"port": 80}, {"port": 81, "name": "b"}]),
        endpoints("IPv4", ports=[{"port": 80}, {"port": 81}]),
        "",
    ),
    Case(
        "1 to 100 addresses are required",
        endpoints("IPv4", *(["127.0.0.1"] * 100)),
        endpoints("IPv4", *(["127.0.0.1"] * 101)),
        "endpoints[0]",
    ),
    *(
        Case(
            "keys must be at most 253",
            manifest(kind, **{field: {"a-B_1.x": "YQ=="}}),
            manifest(kind, **{field: {bad: "YQ=="}}),
            field,
        )
        for kind, field in (("Secret", "data"), ("ConfigMap", "data"), ("ConfigMap", "binaryData"))
        for bad in ("a/b", "..a", "a" * 254)
    ),
    *(
        Case(
            "must be at most 1048576 bytes in all",
            manifest(kind, **{field: {"a": "a" * 1048576}}),
            manifest(kind, **{field: {"a": "a" * 1048576, "b": "b"}}),
            "",
        )
        for kind, field in (("Secret", "stringData"), ("ConfigMap", "data"))
    ),
    Case(
        "type kubernetes.io/tls needs tls.crt and tls.key",
        manifest("Secret", type="kubernetes.io/tls", data={"tls.crt": "", "tls.key": ""}),
        manifest("Secret", type="kubernetes.io/tls", data={"tls.crt": ""}),
        "",
    ),
    Case(
        "a key may stand in data or in binaryData",
        manifest("ConfigMap", data={"a": ""}, binaryData={"b": ""}),
        manifest("ConfigMap", data={"a": ""}, binaryData={"a": ""}),
        "",
    ),
    Case(
        "must be an IP address",
        pod(podIP="fd00::1"),
        pod(podIP="fd00::1%eth0"),
        "status.podIP",
    ),
    Case(
        "must be an IP address",
        pod(podIPs=[{"ip": "10.0.0.1"}]),
        pod(podIPs=[{"ip": "10.0.0"}]),
        "status.podIPs[0].ip",
    ),
    Case(
        "podIPs must begin with podIP",
        pod(podIP="10.0.0.1", podIPs=[{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]),
        pod(podIP="10.0.0.1", podIPs=[{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]),
        "status",
    ),
    Case(
        "InternalIP must be an IP address",
        node({"type": "Hostname", "address": "n1"}),
        node({"type": "InternalIP", "address": "n1"}),
        "status.addresses[0]",
    ),
    # Policies.
    *(
        Case(
            "In and NotIn have values, others none",
            peer(podSelector={"matchExpressions": [{"key": "app", **good}]}),
            peer(podSelector={"matchExpressions": [{"key": "app", **bad}]}),
            "spec.ingress[0].from[0].podSelector.matchExpressions[0]",
        )
        for good, bad in (
            ({"operator": "In", "values": ["a"]}, {"operator": "NotIn"}),
            ({"operator": "Exists"}, {"operator": "DoesNotExist", "values": ["a"]}),
        )
    ),
    *(
        Case(
            "keys must be qualified names",
            peer(podSelector={"matchLabels": {"example.com/app": "a"}}),
            peer(podSelector={"matchLabels": {bad: "a"}}),
            "spec.ingress[0].from[0].podSelector",
        )
        for bad in ("", "k8s:app", "a/b/c", "a" * 64, "a" * 254 + "/b")
    ),
    *(
        Case(
            "a peer is selectors, or an ipBlock alone",
            peer(podSelector={}, namespaceSelector={}),
            peer(**bad),
            "spec.ingress[0].from[0]",
        )
        for bad in ({}, {"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}})
    ),
    *(
        Case(
            "cidr must be a CIDR, except CIDRs that are parts of it",
            peer(ipBlock={"cidr": "fd00::/8", "except": ["fd00::/16"]}),
            peer(ipBlock=bad),
            "spec.ingress[0].from[0].ipBlock",
        )
        for bad in (
            {"cidr": "10.0.0.1/8"},
            {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/33"]},
            {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]},
            {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]},
            {"cidr": "10.0.0.0/8", "except": ["fd00::/16"]},
        )
    ),
    *(
        Case(
            "port must be 1 to 65535 or a port's name",
            policy_port(port=good),
            policy_port(port=bad),
            "spec.egress[0].ports[0]",
        )
        for good, bad in ((1, 0), (65535, 65536), ("http", "HTTP"), ("a-1", "1-1"))
    ),
    *(
        Case(
            "endPort must be port or above",
            policy_port(port=80, endPort=80),
            policy_port(**bad),
            "spec.egress[0].ports[0]",
        )
        for bad in (
            {"port": 80, "endPort": 79},
            {"port": 80, "endPort": 65536},
            {"port": "http", "endPort": 80},
            {"endPort": 80},
        )
    ),
    Case(
        "must be unique",
        manifest("NetworkPolicy", {"policyTypes": ["Ingress", "Egress"]}),
        manifest("NetworkPolicy", {"policyTypes": ["Ingress", "Ingress"]}),
        "spec.policyTypes",
    ),
    *(
        Case(
            "exactly one of endpointSelector and nodeSelector is required",
            cilium(kind),
            bad,
            "spec",
        )
        for kind in ("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy")
        for bad in (manifest(kind, {"ingress": []}), cilium(kind, nodeSelector={}))
    ),
    *(
        Case(
            "exactly one of cidr and cidrGroupRef is required",
            cilium(egress=[{"toCIDRSet": [{"cidr": "10.0.0.0/8"}]}]),
            cilium(egress=[{"toCIDRSet": [bad]}]),
            "spec.egress[0].toCIDRSet[0]",
        )
        for bad in ({}, {"cidr": "10.0.0.0/8", "cidrGroupRef": "a"})
    ),
]
