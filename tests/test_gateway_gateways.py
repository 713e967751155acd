"""GatewayClass, Gateway and listener status, ports, addresses."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.control import Options
from gateway.features import SUPPORTED_FEATURES
from gateway.status import with_transition_times
from mesh.model.nodeconfig import Settings
from tests.gateway_world import (
    BACKEND,
    CLASS,
    GATEWAY,
    ROUTE,
    World,
    ca_config_map,
    ca_pem,
    join,
    plain,
    tls_secret,
)

HTTPS = """
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: weft
  listeners:
  - name: https
    port: 443
    protocol: HTTPS
    tls: {certificateRefs: [{name: cert}]}
"""

POOL = Options(addresses=("127.9.0.0/29",))


def gateway(name: str, *, created: str = "", address: str = "", port: int = 80) -> str:
    spec = f"addresses: [{{value: {address}}}]" if address else "infrastructure: {}"
    stamp = f", creationTimestamp: '{created}'" if created else ""
    return f"""
kind: Gateway
metadata: {{name: {name}{stamp}}}
spec:
  gatewayClassName: weft
  {spec}
  listeners: [{{name: http, port: {port}, protocol: HTTP}}]
"""


# --- classes ------------------------------------------------------------------------------------


def test_class_is_accepted_and_names_what_is_enforced() -> None:
    world = World()
    status = world.status("GatewayClass", "weft", "")
    assert [(c.type, c.status, c.observed_generation) for c in status.conditions] == [
        ("Accepted", "True", 3),
        ("SupportedVersion", "True", 3),
    ]
    names = [feature.name for feature in status.supported_features]
    assert names == sorted(names) == list(SUPPORTED_FEATURES)
    assert "TLSRoute" not in names


def test_class_with_parameters_is_refused_and_its_gateways_wait() -> None:
    world = World()
    world.apply(
        join(
            """
kind: GatewayClass
metadata: {name: weft}
spec:
  controllerName: weft.dev/gateway-controller
  parametersRef: {group: "", kind: ConfigMap, name: settings, namespace: default}
""",
            GATEWAY,
        )
    )
    assert "False InvalidParameters" in str(
        [(f"{c.status} {c.reason}") for c in world.status("GatewayClass", "weft", "").conditions]
    )
    assert world.gateway()["Accepted"] == "False Pending"
    assert not world.of("port")


def test_other_controllers_classes_get_nothing() -> None:
    world = World()
    world.apply(
        join(
            """
kind: GatewayClass
metadata: {name: theirs}
spec: {controllerName: example.com/other}
""",
            GATEWAY.replace("weft", "theirs"),
            ROUTE,
        )
    )
    assert list(world.statuses) == [("GatewayClass", ("", "weft"))]
    # When the class becomes ours, so does everything that hangs on it.
    world.apply(
        """
kind: GatewayClass
metadata: {name: theirs}
spec: {controllerName: weft.dev/gateway-controller}
"""
    )
    assert world.gateway()["Programmed"] == "True"
    assert world.route("route")["Accepted"] == "True"


# --- a Gateway's life ---------------------------------------------------------------------------


def test_gateway_is_programmed_only_once_its_port_is_bound() -> None:
    world = World()
    world.answer = False
    world.apply(GATEWAY)
    assert world.gateway() == {
        "Accepted": "True",
        "Programmed": "Unknown Pending",
        "ResolvedRefs": "True",
    }
    assert world.listener("http")["Programmed"] == "Unknown Pending"
    world.change({}, binds={("0.0.0.0", 80): ""})
    assert world.gateway()["Programmed"] == "True"
    assert world.listener("http") == {
        "Accepted": "True",
        "Programmed": "True",
        "ResolvedRefs": "True",
        "Conflicted": "False NoConflicts",
    }
    assert plain(world.status("Gateway", "gw").addresses) == [
        {"type": "IPAddress", "value": "192.0.2.10"}
    ]
    assert plain(world.sections["port/0.0.0.0|80"]) == {
        "type": "port",
        "address": "0.0.0.0",
        "port": 80,
        "protocol": "HTTP",
        "gateway": "default/gw",
        "listeners": [{"id": "Gateway/default/gw/http"}],
    }
    assert world.sections["settings"] == Settings()
    world.delete("Gateway", "gw")
    assert world.status("Gateway", "gw") is None
    assert not world.of("port")


def test_port_that_cannot_be_bound_says_why_and_what_to_do() -> None:
    world = World(unbindable={"0.0.0.0": "it is in use: stop who uses it"})
    world.apply(GATEWAY)
    assert world.listener("http")["Programmed"] == "False PortUnavailable"
    assert world.message("Gateway", "gw", "Programmed", "http") == (
        "cannot listen on port 80 of 0.0.0.0: it is in use: stop who uses it"
    )
    assert world.gateway()["Programmed"] == "False Invalid"
    world.change({}, binds={("0.0.0.0", 80): ""})
    assert world.gateway()["Programmed"] == "True"


def test_section_refused_by_the_data_plane() -> None:
    world = World()
    world.apply(GATEWAY)
    world.refuse("port/0.0.0.0|80", "too many listeners")
    assert world.listener("http")["Programmed"] == "False Invalid"
    assert "too many listeners" in world.message("Gateway", "gw", "Programmed", "http")
    world.refuse("port/0.0.0.0|80", None)
    assert world.listener("http")["Programmed"] == "True"


def test_generation_is_observed_everywhere() -> None:
    world = World()
    world.apply(join(BACKEND, GATEWAY, ROUTE), generation=41)
    world.apply(join(GATEWAY, ROUTE), generation=42)
    status = world.status("Gateway", "gw")
    found = [*status.conditions, *status.listeners[0].conditions]
    found += world.status("HTTPRoute", "route").parents[0].conditions
    assert {one.observed_generation for one in found} == {42}


def test_parameters_are_refused() -> None:
    world = World()
    parameters = "{group: example.com, kind: Settings, name: mine}"
    world.apply(
        join(GATEWAY + f"  infrastructure: {{parametersRef: {parameters}}}", BACKEND, ROUTE)
    )
    assert world.gateway()["Accepted"] == "False InvalidParameters"
    assert world.gateway()["Programmed"] == "False Invalid"
    assert "spec.infrastructure.parametersRef" in world.message("Gateway", "gw", "Accepted")
    assert not world.of("port")
    # Its routes do not claim to be served.
    assert world.route("route")["Accepted"] == "False Pending"
    assert not world.of("route")
    world.apply(GATEWAY)
    assert world.route("route")["Accepted"] == "True"


# --- listeners ----------------------------------------------------------------------------------


def test_unsupported_protocols_and_route_kinds() -> None:
    world = World()
    world.apply(
        """
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: weft
  listeners:
  - {name: tcp, port: 9000, protocol: TCP}
  - name: some
    port: 80
    protocol: HTTP
    allowedRoutes: {kinds: [{kind: TLSRoute}, {kind: HTTPRoute}]}
  - {name: none, port: 81, protocol: HTTP, allowedRoutes: {kinds: [{kind: TLSRoute}]}}
"""
    )
    assert world.gateway()["Accepted"] == "True ListenersNotValid"
    assert world.listener("tcp")["Accepted"] == "False UnsupportedProtocol"
    assert world.listener("some")["ResolvedRefs"] == "False InvalidRouteKinds"
    assert world.listener("some")["Programmed"] == "True"
    assert world.listener("none")["Programmed"] == "False Invalid"
    kinds = {
        one.name: [kind.kind for kind in one.supported_kinds]
        for one in world.status("Gateway", "gw").listeners
    }
    assert kinds == {"tcp": [], "some": ["HTTPRoute"], "none": []}
    assert set(world.of("port")) == {"port/0.0.0.0|80"}


def test_listeners_that_conflict_in_one_gateway_are_none_of_them_served() -> None:
    world = World()
    world.apply(
        join(
            tls_secret("cert"),
            """
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: weft
  listeners:
  - {name: plain, port: 80, protocol: HTTP}
  - name: tls
    port: 80
    protocol: HTTPS
    hostname: x.example.com
    tls: {certificateRefs: [{name: cert}]}
  - {name: other, port: 81, protocol: HTTP}
""",
        )
    )
    for name in ("plain", "tls"):
        assert world.listener(name)["Conflicted"] == "True ProtocolConflict"
        assert world.listener(name)["Accepted"] == "False ProtocolConflict"
        assert world.listener(name)["Programmed"] == "False ProtocolConflict"
    assert world.listener("other")["Programmed"] == "True"
    assert set(world.of("port")) == {"port/0.0.0.0|81"}


# --- TLS ----------------------------------------------------------------------------------------


def test_certificate_comes_goes_and_is_wrong() -> None:
    world = World()
    world.apply(HTTPS)
    assert world.listener("https")["ResolvedRefs"] == "False InvalidCertificateRef"
    assert "Secret default/cert does not exist" in world.message(
        "Gateway", "gw", "ResolvedRefs", "https"
    )
    assert world.listener("https")["Accepted"] == "True"
    assert not world.of("port")
    world.apply(tls_secret("cert"))
    assert world.listener("https")["Programmed"] == "True"
    assert plain(world.sections["port/0.0.0.0|443"].listeners) == [
        {"id": "Gateway/default/gw/https", "certificates": ["certificate/default/cert"]}
    ]
    assert list(world.of("certificate")) == ["certificate/default/cert"]
    world.apply("kind: Secret\nmetadata: {name: cert}\ntype: Opaque")
    assert world.listener("https")["ResolvedRefs"] == "False InvalidCertificateRef"
    assert "is of type Opaque" in world.message("Gateway", "gw", "ResolvedRefs", "https")
    assert not world.of("certificate")


@pytest.mark.parametrize(
    ("refs", "says"),
    [
        ("[{name: binary}]", "must be PEM text"),
        ("[{name: garbage}]", "no PEM certificate"),
        ("[{kind: ConfigMap, name: cert}]", "ConfigMap cert: use a Secret"),
        ("[{group: example.com, kind: Vault, name: cert}]", "example.com/Vault cert: use a Secret"),
    ],
)
def test_certificate_that_is_none(refs: str, says: str) -> None:
    world = World()
    world.apply(
        join(
            HTTPS.replace("[{name: cert}]", refs),
            "kind: Secret\nmetadata: {name: binary}\ntype: kubernetes.io/tls\n"
            "data: {tls.crt: /w==, tls.key: /w==}",
            "kind: Secret\nmetadata: {name: garbage}\ntype: kubernetes.io/tls\n"
            "data: {tls.crt: QQ==, tls.key: QQ==}",
        )
    )
    assert world.listener("https")["ResolvedRefs"] == "False InvalidCertificateRef"
    assert says in world.message("Gateway", "gw", "ResolvedRefs", "https")


def test_https_without_certificates() -> None:
    world = World()
    world.apply(GATEWAY.replace("protocol: HTTP}", "protocol: HTTPS}"))
    assert world.listener("http")["ResolvedRefs"] == "False InvalidCertificateRef"
    assert "names no certificate" in world.message("Gateway", "gw", "ResolvedRefs", "http")


def test_one_good_certificate_is_enough_to_serve() -> None:
    world = World()
    refs = "[{name: missing}, {name: cert}]"
    world.apply(join(HTTPS.replace("[{name: cert}]", refs), tls_secret("cert")))
    assert world.listener("https")["ResolvedRefs"] == "False InvalidCertificateRef"
    assert world.listener("https")["Programmed"] == "True"
    assert world.gateway()["Accepted"] == "True ListenersNotValid"


def test_certificate_refused_by_the_data_plane() -> None:
    world = World()
    world.apply(join(HTTPS, tls_secret("cert")))
    world.refuse("certificate/default/cert", "key too small")
    assert world.listener("https")["Programmed"] == "False Invalid"
    assert "key too small" in world.message("Gateway", "gw", "Programmed", "https")


def test_tls_options_are_refused_by_name() -> None:
    world = World()
    text = HTTPS.replace("tls: {", "tls: {options: {example.com/min-version: '1.3'}, ")
    world.apply(join(text, tls_secret("cert")))
    assert world.listener("https")["Accepted"] == "False UnsupportedValue"
    assert "example.com/min-version" in world.message("Gateway", "gw", "Accepted", "https")


def test_only_referenced_secrets_leave_the_control_plane() -> None:
    world = World()
    world.apply(join(HTTPS, tls_secret("cert"), tls_secret("unrelated")))
    assert list(world.of("certificate")) == ["certificate/default/cert"]


@pytest.mark.parametrize(
    ("who", "namespace", "what", "expected"),
    [
        ("Gateway", "default", "kind: Secret", "True"),
        ("Gateway", "default", "kind: Secret, name: cert", "True"),
        ("Gateway", "default", "kind: Secret, name: another", "False RefNotPermitted"),
        ("Gateway", "default", "kind: Service", "False RefNotPermitted"),
        ("Gateway", "elsewhere", "kind: Secret", "False RefNotPermitted"),
        ("HTTPRoute", "default", "kind: Secret", "False RefNotPermitted"),
    ],
)
def test_certificates_of_other_namespaces_need_a_grant(
    who: str, namespace: str, what: str, expected: str
) -> None:
    world = World()
    world.apply(
        join(
            HTTPS.replace("{name: cert}", "{name: cert, namespace: secrets}"),
            tls_secret("cert", namespace="secrets"),
        )
    )
    assert world.listener("https")["ResolvedRefs"] == "False RefNotPermitted"
    # What may not be referred to is not looked at either.
    assert not world.of("certificate")
    world.apply(f"""
kind: ReferenceGrant
metadata: {{name: g, namespace: secrets}}
spec:
  from: [{{group: gateway.networking.k8s.io, kind: {who}, namespace: {namespace}}}]
  to: [{{group: "", {what}}}]
""")
    assert world.listener("https")["ResolvedRefs"] == expected
    world.delete("ReferenceGrant", "g", "secrets")
    assert world.listener("https")["ResolvedRefs"] == "False RefNotPermitted"
    assert not world.of("certificate")


def test_frontend_validation_by_default_and_per_port() -> None:
    world = World()
    world.apply(
        join(
            tls_secret("cert"),
            ca_config_map("ca"),
            """
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: weft
  tls:
    frontend:
      default: {validation: {caCertificateRefs: [{group: "", kind: ConfigMap, name: ca}]}}
      perPort:
      - port: 8443
        tls:
          validation:
            mode: AllowInsecureFallback
            caCertificateRefs: [{group: "", kind: ConfigMap, name: ca}]
      - {port: 9443, tls: {}}
  listeners:
  - {name: a, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}
  - {name: b, port: 8443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}
  - {name: c, port: 9443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}
  - {name: d, port: 80, protocol: HTTP}
""",
        )
    )
    found = {
        section.port: plain(section.client_validation) for section in world.of("port").values()
    }
    assert found == {
        443: {"ca_pem": ca_pem()},
        8443: {"ca_pem": ca_pem(), "mode": "AllowInsecureFallback"},
        9443: None,
        80: None,
    }
    assert world.gateway()["InsecureFrontendValidationMode"] == "True ConfigurationChanged"


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("{group: '', kind: ConfigMap, name: missing}", "InvalidCACertificateRef"),
        ("{group: '', kind: ConfigMap, name: empty}", "InvalidCACertificateRef"),
        ("{group: '', kind: ConfigMap, name: garbage}", "InvalidCACertificateRef"),
        ("{group: '', kind: Service, name: ca}", "InvalidCACertificateKind"),
        ("{group: '', kind: ConfigMap, name: ca, namespace: other}", "RefNotPermitted"),
    ],
)
def test_broken_frontend_validation_refuses_every_client(ref: str, reason: str) -> None:
    world = World()
    world.apply(
        join(
            tls_secret("cert"),
            ca_config_map("ca"),
            ca_config_map("ca", namespace="other"),
            "kind: ConfigMap\nmetadata: {name: empty}",
            "kind: ConfigMap\nmetadata: {name: garbage}\ndata: {ca.crt: garbage}",
            HTTPS
            + f"  tls: {{frontend: {{default: {{validation: {{caCertificateRefs: [{ref}]}}}}}}}}",
        )
    )
    assert world.listener("https") == {
        "Accepted": "False NoValidCACertificate",
        "Programmed": "False Invalid",
        "ResolvedRefs": f"False {reason}",
        "Conflicted": "False NoConflicts",
    }
    validation = world.sections["port/0.0.0.0|443"].client_validation
    assert (validation.mode, validation.ca_pem) == ("RefuseAll", "")


def test_client_certificate_toward_backends() -> None:
    world = World()
    text = GATEWAY + "  tls: {backend: {clientCertificateRef: {name: client}}}"
    world.apply(text)
    assert world.gateway()["ResolvedRefs"] == "False InvalidClientCertificateRef"
    assert world.gateway()["Accepted"] == "True"
    world.apply(tls_secret("client"))
    assert world.gateway()["ResolvedRefs"] == "True"
    assert world.sections["port/0.0.0.0|80"].client_certificate == "certificate/default/client"
    assert list(world.of("certificate")) == ["certificate/default/client"]


# --- addresses and ports ------------------------------------------------------------------------


def test_pool_gives_each_gateway_an_address_of_its_own() -> None:
    world = World(POOL)
    for name in ("a", "b", "c"):
        world.apply(gateway(name))
    given = {name: world.status("Gateway", name).addresses[0].value for name in "abc"}
    assert len(set(given.values())) == 3
    assert all(address.startswith("127.9.0.") for address in given.values())
    assert set(world.of("port")) == {f"port/{address}|80" for address in given.values()}
    # The same Gateways get the same addresses, in whatever order they come.
    again = World(POOL)
    for name in ("c", "a", "b"):
        again.apply(gateway(name))
    assert {n: again.status("Gateway", n).addresses[0].value for n in "abc"} == given


def test_a_younger_gateway_moves_no_older_one() -> None:
    world = World(POOL)
    world.apply(gateway("z", created="2024-01-01T00:00:00Z"))
    before = world.status("Gateway", "z").addresses
    for name in "abcde":
        world.apply(gateway(name, created="2024-01-02T00:00:00Z"))
    assert world.status("Gateway", "z").addresses == before


def test_a_class_has_a_pool_of_its_own() -> None:
    world = World(POOL)
    own = CLASS.replace("{name: weft,", "{name: weft, annotations: {weft.dev/address-pool: %s},")
    world.apply(own % "127.8.0.1")
    world.apply(gateway("a"))
    assert world.status("Gateway", "a").addresses[0].value == "127.8.0.1"
    world.apply(own % "'127.8.1.0/30, fd00::/126'")
    assert world.status("Gateway", "a").addresses[0].value in (
        *("127.8.1.1", "127.8.1.2"),
        *("fd00::", "fd00::1", "fd00::2", "fd00::3"),
    )
    # With a typing error it has none, and says so.
    world.apply(own % "127.8.1.1/30")
    (accepted, *_) = world.status("GatewayClass", "weft", "").conditions
    assert (accepted.type, accepted.reason) == ("Accepted", "InvalidParameters")
    assert "annotation weft.dev/address-pool: 127.8.1.1/30" in accepted.message
    assert not world.of("port")
    # Without, it has that of the command line.
    world.apply(CLASS)
    assert world.status("Gateway", "a").addresses[0].value.startswith("127.9.0.")


def test_exhausted_pool() -> None:
    world = World(Options(addresses=("127.9.0.1/32",)))
    world.apply(join(gateway("a"), gateway("b")))
    assert world.gateway("a")["Programmed"] == "True"
    assert world.gateway("b")["Accepted"] == "True"
    assert world.gateway("b")["Programmed"] == "False AddressNotAssigned"
    assert "no address left (it has 1)" in world.message("Gateway", "b", "Programmed")
    world.delete("Gateway", "a")
    assert world.gateway("b")["Programmed"] == "True"


def test_requested_addresses() -> None:
    world = World(POOL, unbindable={"198.51.100.1": "Cannot assign requested address"})
    world.apply(gateway("gw", address="127.9.0.3"))
    assert world.gateway()["Programmed"] == "True"
    assert world.status("Gateway", "gw").addresses[0].value == "127.9.0.3"
    world.apply(gateway("gw", address="198.51.100.1"))
    assert world.gateway()["Accepted"] == "True"
    assert world.gateway()["Programmed"] == "False AddressNotUsable"
    assert world.status("Gateway", "gw").addresses == ()
    assert "Cannot assign requested address" in world.message("Gateway", "gw", "Programmed")
    # An address outside the pool is fine where the host has it.
    world.apply(gateway("gw", address="127.77.0.1"))
    assert world.gateway()["Programmed"] == "True"
    world.apply(gateway("gw", address="0.0.0.0"))
    assert world.gateway()["Programmed"] == "False AddressNotUsable"
    assert not world.of("port")


def test_unsupported_address_type() -> None:
    world = World(POOL)
    world.apply(GATEWAY + "  addresses: [{type: Hostname, value: gw.example.com}]")
    assert world.gateway()["Accepted"] == "False UnsupportedAddress"
    assert "spec.addresses[0].type Hostname" in world.message("Gateway", "gw", "Accepted")


def test_empty_address_asks_for_one() -> None:
    world = World(POOL)
    world.apply(GATEWAY + "  addresses: [{type: IPAddress}]")
    assert world.gateway()["Programmed"] == "True"
    assert len(world.status("Gateway", "gw").addresses) == 1


def test_without_a_pool_the_older_gateway_has_the_port() -> None:
    world = World()
    world.apply(gateway("b", created="2024-01-02T00:00:00Z"))
    assert world.gateway("b")["Programmed"] == "True"
    world.apply(gateway("a", created="2024-01-03T00:00:00Z"))
    assert world.listener("http", "a")["Accepted"] == "False PortUnavailable"
    message = world.message("Gateway", "a", "Accepted", "http")
    assert "belongs to Gateway default/b" in message
    assert "address pool" in message
    assert world.gateway("a")["Accepted"] == "False ListenersNotValid"
    world.apply(gateway("c", created="2024-01-01T00:00:00Z"))
    assert world.gateway("b")["Accepted"] == "False ListenersNotValid"
    assert world.sections["port/0.0.0.0|80"].gateway == "default/c"
    world.delete("Gateway", "c")
    assert world.gateway("b")["Programmed"] == "True"
    world.apply(gateway("a", port=81))
    assert world.gateway("a")["Programmed"] == "True"


def test_what_is_advertised_for_a_host_may_be_a_name() -> None:
    world = World(Options(advertise=("gw.example.com", "192.0.2.7")))
    world.apply(GATEWAY)
    assert plain(world.status("Gateway", "gw").addresses) == [
        {"type": "Hostname", "value": "gw.example.com"},
        {"type": "IPAddress", "value": "192.0.2.7"},
    ]
    assert list(world.of("entry")) == ["entry/192.0.2.7|80/TCP"]


def test_pool_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/99"):
        World(Options(addresses=("10.0.0.0/99",)))


# --- load-balancer entries ----------------------------------------------------------------------


def test_entries_of_services_and_gateways() -> None:
    world = World()
    world.apply(join(BACKEND, GATEWAY))
    assert plain(world.of("entry")) == {
        "entry/10.96.0.7|80/TCP": {
            "type": "entry",
            "address": "10.96.0.7",
            "port": 80,
            "protocol": "TCP",
            "backends": [
                {"address": "10.0.0.1", "port": 8080},
                {"address": "10.0.0.2", "port": 8080},
            ],
            "source": "Service/default/backend",
        },
        "entry/192.0.2.10|80/TCP": {
            "type": "entry",
            "address": "192.0.2.10",
            "port": 80,
            "protocol": "TCP",
            "backends": [{"address": "192.0.2.10", "port": 80}],
            "source": "Gateway/default/gw",
        },
    }
    world.delete("EndpointSlice", "backend-1")
    assert world.sections["entry/10.96.0.7|80/TCP"].backends == ()


def test_entries_have_the_endpoints_of_their_own_family() -> None:
    world = World()
    world.apply(
        BACKEND.replace("clusterIP: 10.96.0.7", "clusterIPs: [10.96.0.7, fd00::7]")
        + """---
kind: EndpointSlice
metadata:
  name: backend-6
  labels: {kubernetes.io/service-name: backend}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [fd01::1], conditions: {ready: true}, targetRef: {kind: Pod, name: backend-a}}
"""
    )
    four, six = (world.sections[f"entry/{vip}|80/TCP"] for vip in ("10.96.0.7", "fd00::7"))
    assert [backend.address for backend in four.backends] == ["10.0.0.1", "10.0.0.2"]
    assert [backend.address for backend in six.backends] == ["fd01::1"]


@pytest.mark.parametrize(
    ("affinity", "seconds"),
    [
        ("sessionAffinity: None", None),
        ("sessionAffinity: ClientIP", 10_800),
        (
            "sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}",
            60,
        ),
    ],
)
def test_entries_keep_clients_where_the_service_asks_for_it(
    affinity: str, seconds: int | None
) -> None:
    world = World()
    world.apply(BACKEND.replace("spec:", f"spec:\n  {affinity}", 1))
    assert world.sections["entry/10.96.0.7|80/TCP"].affinity_s == seconds


# --- transition times ---------------------------------------------------------------------------


def test_transition_times_change_only_with_the_status() -> None:
    world = World()
    world.answer = False
    world.apply(join(BACKEND, GATEWAY, ROUTE))
    first = with_transition_times(None, world.status("Gateway", "gw"), "2024-01-01T00:00:00Z")
    world.change({}, binds={("0.0.0.0", 80): ""})
    second = with_transition_times(first, world.status("Gateway", "gw"), "2024-01-02T00:00:00Z")

    def times(found: Any) -> dict[str, str]:
        return {one.type: one.last_transition_time[:10] for one in found}

    expected = {
        "Accepted": "2024-01-01",
        "Programmed": "2024-01-02",
        "ResolvedRefs": "2024-01-01",
    }
    assert times(second.conditions) == expected
    assert times(second.listeners[0].conditions) == expected | {"Conflicted": "2024-01-01"}
    route = world.status("HTTPRoute", "route")
    one = with_transition_times(None, route, "2024-01-01T00:00:00Z")
    world.delete("Service", "backend")
    two = with_transition_times(one, world.status("HTTPRoute", "route"), "2024-01-02T00:00:00Z")
    assert times(two.parents[0].conditions) == {
        "Accepted": "2024-01-01",
        "ResolvedRefs": "2024-01-02",
    }
