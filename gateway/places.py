"""Where a Gateway listens: the addresses it has, the ports it claims on them, and who owns a port.

Two Gateways may want the same address and port (there is no pool, or both name the address): the
older has it, by creation time, then name. Allocation itself is in gateway.addresses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gateway.addresses import Pool, Request, allocate, canonical, pool_of
from gateway.classes import Ours
from gateway.cluster_ips import whose
from gateway.conditions import Problem
from gateway.keys import PortKey
from gateway.listeners import Merged
from gateway.node import Mesh
from mesh.model.derive import View
from mesh.model.gateway import GatewayStatusAddress
from mesh.model.meta import ObjectKey


class Places(NamedTuple):
    """`bind`: addresses to listen on; `requested`: those of them that spec.addresses names;
    `status`: what status.addresses says; `problem`: why there are not all that are asked for."""

    bind: tuple[str, ...]
    requested: frozenset[str]
    status: tuple[GatewayStatusAddress, ...]
    problem: Problem | None


def requests(pool: tuple[str, ...]) -> Callable[[View, ObjectKey], Request | None]:
    """`pool`: for Gateways whose class names none."""

    def compute(view: View, key: ObjectKey) -> Request | None:
        ours: Ours = view.get("gateways", key)
        if ours.problem is not None:
            return None
        wanted = tuple(address.value or "" for address in ours.gateway.spec.addresses) or ("",)
        created = ours.gateway.metadata.creation_timestamp or ""
        return Request(created, key, wanted, ours.pool or pool)

    return compute


def allocation(view: View, bucket: str) -> dict[ObjectKey, tuple[str | None, ...]]:
    return allocate(view.get("requests", key) for key in view.bucket("requested", bucket))


def places(
    bind_address: str, advertise: tuple[str, ...]
) -> Callable[[View, ObjectKey], Places | None]:
    def compute(view: View, key: ObjectKey) -> Places | None:
        request: Request | None = view.get("requests", key)
        if request is None:
            return None
        pool = pool_of(request.pool)
        given: Mapping[ObjectKey, tuple[str | None, ...]] = view.get("allocation", "")
        bind: dict[str, None] = {}
        shown: dict[str, None] = {}
        problem: Problem | None = None
        for address in given[key]:
            if address is not None and (unusable := _unusable(view, pool, address)):
                problem = problem or Problem("AddressNotUsable", unusable)
            elif address is not None:
                bind[address] = shown[address] = None
            elif not pool.size:
                bind[bind_address] = None
                shown.update(dict.fromkeys(advertise))
            else:
                problem = problem or Problem(
                    "AddressNotAssigned",
                    f"the address pool has no address left (it has {pool.size}); enlarge it, or"
                    " name an address in spec.addresses",
                )
        return Places(
            tuple(bind),
            frozenset(filter(None, request.wanted)),
            tuple(_status_address(address) for address in shown),
            problem,
        )

    return compute


def _unusable(view: View, pool: Pool, address: str) -> str | None:
    """Why an address is out of the question for a Gateway on any host. What pods and Services have
    they keep: who asks for them must not get to a Gateway."""
    ip = ipaddress.ip_address(address)
    if address not in pool and (ip.is_unspecified or ip.is_multicast):
        return f"spec.addresses: {address} is not an address of one host"
    if owner := whose(view, canonical(address)):
        return f"{address} is the address of {owner}; use another"
    return None


def _status_address(address: str) -> GatewayStatusAddress:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return GatewayStatusAddress(type="Hostname", value=address)
    return GatewayStatusAddress(type="IPAddress", value=address)


def claims(view: View, key: ObjectKey) -> frozenset[PortKey] | None:
    """The ports a Gateway wants to listen on."""
    place: Places | None = view.get("places", key)
    if place is None:
        return None
    listeners: tuple[Merged, ...] = view.get("merged", key)
    ports = {one.spec.port for one in listeners if one.problem is None and one.conflict is None}
    return frozenset((address, port) for address in place.bind for port in ports)


def owners(mesh: Mesh) -> Callable[[View, PortKey], ObjectKey | None]:
    def compute(view: View, port: PortKey) -> ObjectKey | None:
        """The Gateway that has a port: the oldest of those that claim it; None: the mesh has it."""
        if mesh.reserves(port):
            return None
        keys = view.bucket("claimants", port)
        claims: list[Request] = [view.get("requests", key) for key in keys]
        return min(claims).key

    return compute


def taken(view: View, key: ObjectKey, port: PortKey) -> Problem | None:
    """Why a Gateway's listener cannot have a port that it claims."""
    owner: ObjectKey | None = view.get("owners", port)
    if owner == key:
        return None
    address, number = port
    if owner is None:
        message = f"port {number} on {address} is the mesh's; use another port"
        return Problem("PortUnavailable", message)
    return Problem(
        "PortUnavailable",
        f"port {number} on {address} belongs to Gateway {owner}, which is older; use another port,"
        " or give Gateways addresses of their own with an address pool",
    )
