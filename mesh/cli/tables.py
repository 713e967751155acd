"""The table columns of each kind, close to kubectl's. Knows objects as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mesh.agent.unmet import unmet

Item = dict[str, Any]


class Column(NamedTuple):
    """`wide`: only with -o wide."""

    header: str
    value: Callable[[Item], str]
    wide: bool = False


def conditions(item: Item, type: str) -> str:
    """The status of a condition, over everything that has it: a route's parents, say. False wins,
    then Unknown."""
    status = item.get("status") or {}
    groups = [status, *(status.get("parents") or ()), *(status.get("ancestors") or ())]
    values = [
        condition["status"]
        for group in groups
        for condition in group.get("conditions") or ()
        if condition["type"] == type
    ]
    return next((value for value in ("False", "Unknown", "True") if value in values), "")


def _condition(type: str) -> Column:
    return Column(type.upper(), lambda item: conditions(item, type))


def _spec(header: str, field: str, *, wide: bool = False) -> Column:
    return Column(header, lambda item: _text((item.get("spec") or {}).get(field)), wide)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _addresses(item: Item) -> str:
    found = (item.get("status") or {}).get("addresses") or ()
    return ",".join(address["value"] for address in found)


def _listeners(item: Item) -> str:
    return ",".join(
        f"{one['name']}:{one.get('port', '')}/{one['protocol']}"
        for one in item["spec"].get("listeners") or ()
    )


def _attached(item: Item) -> str:
    found = (item.get("status") or {}).get("listeners") or ()
    return ",".join(f"{one['name']}={one.get('attachedRoutes', 0)}" for one in found)


def _references(references: Iterable[Item]) -> str:
    return ",".join(
        "/".join(filter(None, (one.get("namespace"), one["name"], one.get("sectionName"))))
        for one in references
    )


def _service_ports(item: Item) -> str:
    return ",".join(
        f"{port['port']}/{port.get('protocol', 'TCP')}" for port in item["spec"].get("ports") or ()
    )


def _slice_ports(item: Item) -> str:
    return ",".join(_text(port.get("port")) or "*" for port in item.get("ports") or ())


def _endpoints(item: Item) -> str:
    return ",".join(
        address for endpoint in item["endpoints"] for address in endpoint.get("addresses") or ()
    )


def _count(item: Item) -> str:
    return str(len(item.get("data") or {}) + len(item.get("binaryData") or {}))


_PARENTS = Column("PARENTS", lambda item: _references(item["spec"].get("parentRefs") or ()), True)
_REASONS = Column("REASONS", lambda item: unmet(item.get("status") or {}), True)
_ROUTE = (
    _spec("HOSTNAMES", "hostnames"),
    _condition("Accepted"),
    _condition("ResolvedRefs"),
    _PARENTS,
    _REASONS,
)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "GatewayClass": (_spec("CONTROLLER", "controllerName"), _condition("Accepted"), _REASONS),
    "Gateway": (
        _spec("CLASS", "gatewayClassName"),
        Column("ADDRESS", _addresses),
        _condition("Accepted"),
        _condition("Programmed"),
        Column("LISTENERS", _listeners, True),
        Column("ROUTES", _attached, True),
        _REASONS,
    ),
    "ListenerSet": (
        Column("GATEWAY", lambda item: _references([item["spec"]["parentRef"]])),
        _condition("Accepted"),
        _condition("Programmed"),
        Column("LISTENERS", _listeners, True),
        _REASONS,
    ),
    "HTTPRoute": _ROUTE,
    "GRPCRoute": _ROUTE,
    "BackendTLSPolicy": (
        Column("TARGETS", lambda item: _references(item["spec"].get("targetRefs") or ())),
        Column("HOSTNAME", lambda item: _text(item["spec"]["validation"].get("hostname"))),
        _condition("Accepted"),
        _condition("ResolvedRefs"),
        _REASONS,
    ),
    **dict.fromkeys(
        ("NetworkPolicy", "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"),
        (_condition("Accepted"), _condition("Programmed"), _REASONS),
    ),
    "ReferenceGrant": (
        Column("FROM", lambda item: _grants(item, "from")),
        Column("TO", lambda item: _grants(item, "to")),
    ),
    "Service": (
        _spec("TYPE", "type"),
        _spec("CLUSTER-IP", "clusterIP"),
        Column("PORT(S)", _service_ports),
    ),
    "EndpointSlice": (
        Column("ADDRESSTYPE", lambda item: _text(item.get("addressType"))),
        Column("PORTS", _slice_ports),
        Column("ENDPOINTS", _endpoints),
    ),
    "Pod": (
        Column("READY", lambda item: _pod_ready(item)),
        Column("STATUS", lambda item: _pod_phase(item)),
        Column("IP", lambda item: _pod_addresses(item)),
        _spec("NODE", "nodeName"),
    ),
    "Node": (Column("INTERNAL-IP", lambda item: _internal_ips(item)),),
    "Secret": (Column("TYPE", lambda item: _text(item.get("type"))), Column("DATA", _count)),
    "ConfigMap": (Column("DATA", _count),),
    "Namespace": (),
}


def _pod_ready(item: Item) -> str:
    found = (item.get("status") or {}).get("conditions") or ()
    return next((one["status"] for one in found if one["type"] == "Ready"), "")


def _pod_phase(item: Item) -> str:
    gone = "deletionTimestamp" in item["metadata"]
    return "Terminating" if gone else (item.get("status") or {}).get("phase", "")


def _internal_ips(item: Item) -> str:
    found = (item.get("status") or {}).get("addresses") or ()
    return ",".join(one["address"] for one in found if one["type"] == "InternalIP")


def _pod_addresses(item: Item) -> str:
    status = item.get("status") or {}
    return ",".join(one["ip"] for one in status.get("podIPs") or ()) or status.get("podIP", "")


def _grants(item: Item, side: str) -> str:
    return ",".join(
        "/".join(filter(None, (one.get("namespace"), one["kind"], one.get("name"))))
        for one in item["spec"].get(side) or ()
    )


def rows(
    kind: str, items: Iterable[Item], *, namespaces: bool, wide: bool
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table."""
    columns = [column for column in COLUMNS[kind] if wide or not column.wide]
    before = ["NAMESPACE", "NAME"] if namespaces else ["NAME"]
    lines = []
    for item in items:
        metadata = item["metadata"]
        first = [metadata.get("namespace", "")] if namespaces else []
        lines.append(
            [*first, metadata["name"], *(column.value(item) or "<none>" for column in columns)]
        )
    return [*before, *(column.header for column in columns)], lines
