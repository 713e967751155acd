"""ListenerSets: who may attach, precedence and conflicts, and routes that attach to them."""

from __future__ import annotations

from tests.gateway_world import BACKEND, GATEWAY, ROUTE, World, conditions, join, tls_secret

OPEN = GATEWAY + "  allowedListeners: {namespaces: {from: Same}}"


def listener_set(
    name: str,
    *listeners: str,
    namespace: str = "default",
    created: str = "2024-01-01T00:00:00Z",
    gateway: str = "gw",
) -> str:
    return f"""
kind: ListenerSet
metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '{created}'}}
spec:
  parentRef: {{name: {gateway}, namespace: default}}
  listeners: [{", ".join(f"{{{one}}}" for one in listeners)}]
"""


def status(world: World, name: str, namespace: str = "default") -> dict[str, str]:
    return conditions(world.status("ListenerSet", name, namespace).conditions)


def test_no_gateway_allows_listener_sets_unless_it_says_so() -> None:
    world = World()
    world.apply(join(GATEWAY, listener_set("set", "name: a, port: 8080, protocol: HTTP")))
    assert status(world, "set") == {
        "Accepted": "False NotAllowed",
        "Programmed": "False NotAllowed",
    }
    assert world.status("Gateway", "gw").attached_listener_sets == 0
    assert set(world.of("port")) == {"port/0.0.0.0|80"}
    world.apply(OPEN)
    assert status(world, "set") == {"Accepted": "True", "Programmed": "True"}
    assert world.status("Gateway", "gw").attached_listener_sets == 1
    assert set(world.of("port")) == {"port/0.0.0.0|80", "port/0.0.0.0|8080"}


def test_namespaces_by_selector() -> None:
    world = World()
    world.apply(
        join(
            GATEWAY
            + "  allowedListeners:"
            + " {namespaces: {from: Selector, selector: {matchLabels: {team: a}}}}",
            listener_set("set", "name: a, port: 8080, protocol: HTTP", namespace="apps"),
        )
    )
    assert status(world, "set", "apps")["Accepted"] == "False NotAllowed"
    world.apply("kind: Namespace\nmetadata: {name: apps, labels: {team: a}}")
    assert status(world, "set", "apps")["Accepted"] == "True"
    world.apply("kind: Namespace\nmetadata: {name: apps, labels: {team: b}}")
    assert status(world, "set", "apps")["Accepted"] == "False NotAllowed"


def test_gateway_then_age_then_name_decide_a_conflict() -> None:
    world = World()
    same = "name: a, port: 8080, protocol: HTTP, hostname: a.example.com"
    young = listener_set("a-young", same, created="2024-02-01T00:00:00Z")
    old = listener_set("b-old", same, "name: b, port: 80, protocol: HTTP")
    twin = listener_set("c-twin", same)
    world.apply(join(OPEN, young))
    assert status(world, "a-young")["Accepted"] == "True"
    world.apply(join(old, twin))
    # The Gateway's own listener has port 80 for every hostname.
    assert world.listener("b", "b-old", "ListenerSet") == {
        "Accepted": "False HostnameConflict",
        "Programmed": "False HostnameConflict",
        "ResolvedRefs": "True",
        "Conflicted": "True HostnameConflict",
    }
    assert world.listener("a", "b-old", "ListenerSet")["Programmed"] == "True"
    assert status(world, "b-old") == {"Accepted": "True ListenersNotValid", "Programmed": "True"}
    for loser in ("a-young", "c-twin"):
        assert status(world, loser) == {
            "Accepted": "False ListenersNotValid",
            "Programmed": "False ListenersNotValid",
        }
    message = world.message("ListenerSet", "a-young", "Conflicted", "a")
    assert "listener a of ListenerSet default/b-old" in message
    assert world.status("Gateway", "gw").attached_listener_sets == 1
    # The Gateway itself is not harmed by what its ListenerSets do.
    assert world.gateway()["Accepted"] == "True"
    world.delete("ListenerSet", "b-old")
    assert status(world, "c-twin")["Accepted"] == "True"


def test_protocol_conflict_with_the_gateway() -> None:
    world = World()
    entry = "name: a, port: 80, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}"
    world.apply(join(OPEN, tls_secret("cert"), listener_set("set", entry)))
    assert world.listener("a", "set", "ListenerSet")["Conflicted"] == "True ProtocolConflict"
    assert world.listener("http")["Conflicted"] == "False NoConflicts"


def test_certificates_are_referred_to_as_a_listener_set() -> None:
    world = World()
    entry = "name: a, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}"
    text = GATEWAY + "  allowedListeners: {namespaces: {from: All}}"
    world.apply(
        join(text, tls_secret("cert", namespace="apps"), listener_set("s", entry, namespace="apps"))
    )
    assert status(world, "s", "apps") == {"Accepted": "True", "Programmed": "True"}
    assert world.sections["port/0.0.0.0|443"].listeners[0].certificates == (
        "certificate/apps/cert",
    )
    world.delete("Secret", "cert", "apps")
    assert status(world, "s", "apps")["Accepted"] == "False ListenersNotValid"


def test_routes_attach_to_what_they_name() -> None:
    world = World()
    entry = "name: extra, port: 8080, protocol: HTTP"
    to_set = ROUTE.replace("{name: gw}", "{kind: ListenerSet, name: set}").replace(
        "name: route", "name: to-set"
    )
    to_gateway = ROUTE.replace("{name: gw}", "{name: gw, sectionName: extra}").replace(
        "name: route", "name: to-gateway"
    )
    world.apply(join(OPEN, BACKEND, ROUTE, listener_set("set", entry), to_set, to_gateway))
    # A Gateway's sections are its own listeners, and a route to it attaches to no ListenerSet.
    assert world.route("to-gateway")["Accepted"] == "False NoMatchingParent"
    assert world.route("to-set")["Accepted"] == "True"
    assert world.attached("extra", "set", "ListenerSet") == 1
    assert world.attached("http") == 1
    attachments = world.sections["route/HTTPRoute/default/to-set"].attachments
    assert [one.listener for one in attachments] == ["ListenerSet/default/set/extra"]
    world.apply(GATEWAY)
    assert world.route("to-set")["Accepted"] == "False NotAllowedByListeners"
    assert "ListenerSet default/set is not accepted" in world.message(
        "HTTPRoute", "to-set", "Accepted"
    )
    assert "route/HTTPRoute/default/to-set" not in world.sections


def test_missing_and_foreign_gateways() -> None:
    world = World()
    world.apply(listener_set("set", "name: a, port: 80, protocol: HTTP"))
    assert status(world, "set")["Accepted"] == "False ParentNotAccepted"
    assert "Gateway default/gw does not exist" in world.message("ListenerSet", "set", "Accepted")
    world.apply(OPEN.replace("weft", "theirs"))
    assert world.status("ListenerSet", "set") is None


def test_gateway_that_is_not_accepted() -> None:
    world = World()
    world.apply(
        join(
            OPEN + "\n  infrastructure: {parametersRef: {group: a.test, kind: B, name: c}}",
            listener_set("set", "name: a, port: 81, protocol: HTTP"),
        )
    )
    assert status(world, "set")["Accepted"] == "False ParentNotAccepted"
    assert world.listener("a", "set", "ListenerSet")["Programmed"] == "False Invalid"
