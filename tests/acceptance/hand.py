"""Steps that the test data leaves to be written: those marked `custom`, and patches whose value
the suite computes. Written after the tests of Gateway API v1.6.1 that they stand for.

A step is named by its test and its number in it (from 0).
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from acceptance.manifests import Ident, Json
from acceptance.pods import endpoint
from acceptance.statuses import NotYet, fetch
from acceptance.world import World, apply_patched, eventually

Step = Callable[[World, Json], Awaitable[None]]
_INFRA = "gateway-conformance-infra"

# What GatewayStaticAddresses is run with: an address that this host does not have (RFC 5737), and
# one that it has and that no other Gateway is given.
UNUSABLE, USABLE = "192.0.2.1", "127.66.0.1"
PLACEHOLDERS = {"PLACEHOLDER_UNUSABLE_ADDRS": UNUSABLE, "PLACEHOLDER_USABLE_ADDRS": USABLE}


async def _part_of_another(_world: World, _step: Json) -> None:
    """The suite's line is done with by the step beside it."""


# --- GatewayModifyListeners ----------------------------------------------------------------------


async def _keep_http_listener(world: World, _step: Json) -> None:
    gateway = world.manifests.get(Ident("Gateway", _INFRA, "gateway-remove-listener"))
    listeners = gateway["spec"]["listeners"]
    gateway["spec"]["listeners"] = [one for one in listeners if one["name"] == "http"]
    apply_patched(world, gateway)


# --- GatewayStaticAddresses ----------------------------------------------------------------------

_STATIC = {"namespace": _INFRA, "name": "gateway-static-addresses"}


async def _without_address(value: str, world: World, _step: Json) -> None:
    gateway = world.manifests.get(Ident("Gateway", _INFRA, "gateway-static-addresses"))
    addresses = gateway["spec"]["addresses"]
    kept = [address for address in addresses if address["value"] != value]
    assert len(kept) == len(addresses) - 1
    gateway["spec"]["addresses"] = kept
    apply_patched(world, gateway)


async def _only_usable_address(world: World, _step: Json) -> None:
    def check() -> None:
        addresses = fetch(world.gateway, "Gateway", _STATIC)["status"].get("addresses", [])
        if addresses != [{"type": "IPAddress", "value": USABLE}]:
            raise NotYet(f"addresses in status: {addresses}, wanted {USABLE} alone")

    await eventually(check, world.wait_s)


# --- HTTPRouteServiceTypes -----------------------------------------------------------------------


async def _fill_endpoint_slice(world: World, step: Json) -> None:
    """All pods of infra-backend-v1 into the IPv4 slices; they have no IPv6 addresses."""
    name = step["name"]["name"]
    if name.endswith("-ip6"):
        return
    slice_ = world.manifests.get(Ident("EndpointSlice", _INFRA, name))
    pods = world.pods.of(_INFRA, {"app": "infra-backend-v1"})
    assert pods
    slice_["endpoints"] = [endpoint(pod) for pod in pods]
    world.manifests.apply(world.file, slice_)


STEPS: dict[tuple[str, int], Step] = {
    ("GatewayModifyListeners", 10): _part_of_another,
    ("GatewayModifyListeners", 11): _keep_http_listener,
    ("GatewayStaticAddresses", 3): _part_of_another,
    ("GatewayStaticAddresses", 4): functools.partial(_without_address, "fake address teehee!"),
    ("GatewayStaticAddresses", 8): functools.partial(_without_address, UNUSABLE),
    ("GatewayStaticAddresses", 13): _only_usable_address,
    **{("GatewayStaticAddresses", number): _part_of_another for number in range(14, 19)},
    **{("HTTPRouteServiceTypes", number): _part_of_another for number in range(2, 7)},
    **{("HTTPRouteServiceTypes", number): _fill_endpoint_slice for number in range(7, 11)},
}
