"""Runs the steps of a case, in order. A step that nothing here handles fails its case."""

from __future__ import annotations

import asyncio
import base64
import copy
from collections.abc import Awaitable, Callable
from typing import Any

from acceptance import hand
from acceptance.cases import Case, guarded
from acceptance.client import TLS, RequestFailed, round_trip
from acceptance.exchange import (
    TIMEOUTS,
    Mismatch,
    check_known,
    compare,
    compare_grpc,
    to_grpc_request,
    to_request,
    with_request_id,
)
from acceptance.manifests import Ident, Json, assign, look_up
from acceptance.shares import check_shares
from acceptance.statuses import HELPERS, NotYet, fetch, gateway_address
from acceptance.world import StepFailed, World, apply_patched, converge, eventually


async def run_case(world: World, case: Case) -> None:
    """StepFailed, Mismatch, NotYet, RequestFailed and whatever else goes wrong: it failed."""
    if not case.steps:
        raise StepFailed("the test data has no steps for this test, and none are written by hand")
    world.generations.clear()
    world.live.clear()
    world.exchange = None
    for number, step in enumerate(case.steps):
        if not guarded(step, world.claimed):
            continue
        _remember_live(world, step)
        by_hand = hand.STEPS.get((case.name, number))
        operation = OPERATIONS.get(step["op"])
        try:
            if by_hand is not None:
                await by_hand(world, step)
            elif operation is not None:
                await operation(world, step, case, number)
            else:
                raise StepFailed("nothing handles this step")
        except Exception as error:
            raise in_step(number, step, error) from error


def in_step(number: int, step: Json, error: Exception) -> StepFailed:
    """What went wrong, and where."""
    kind = "" if isinstance(error, StepFailed) else f"{type(error).__name__}: "
    return StepFailed(f"step {number + 1} ({_name(step)}): {kind}{error}")


def _name(step: Json) -> str:
    if step["op"] == "k8s_assert":
        return str(step["fn"])
    request = (step.get("case") or {}).get("Request")
    if not request:
        return str(step["op"])
    return f"{step['op']} {request.get('Host', '')}{request.get('Path', '')}"


# --- status and objects --------------------------------------------------------------------------


async def _assert(world: World, step: Json, _case: Case, _number: int) -> None:
    helper = HELPERS.get(step["fn"])
    if helper is None:
        raise StepFailed(f"nothing checks {step['fn']}")
    await eventually(lambda: helper(world.gateway, step["args"]), world.wait_s)


async def _patch(world: World, step: Json, _case: Case, _number: int) -> None:
    ident = Ident(step["kind"], step["name"].get("namespace", ""), step["name"]["name"])
    obj = world.manifests.get(ident)
    for change in step["set"]:
        if "append" in change:
            look_up(obj, change["append"]).extend(_resolve(world, change["values"]))
        else:
            assign(obj, change["path"], _resolve(world, change["value"]))
    apply_patched(world, obj)


async def _apply(world: World, step: Json, _case: Case, _number: int) -> None:
    for kind, obj in zip(step["kinds"], step["objects"], strict=True):
        version = {"ConfigMap": "v1", "Secret": "v1", "Service": "v1"}.get(
            kind, "gateway.networking.k8s.io/v1"
        )
        resolved = {"apiVersion": version, "kind": kind, **_resolve(world, obj)}
        world.manifests.apply(world.file, resolved)


async def _delete(world: World, step: Json, _case: Case, _number: int) -> None:
    world.manifests.delete(Ident.of({"kind": step["kind"], **step["object"]}))


async def _generation_changed(world: World, step: Json, _case: Case, _number: int) -> None:
    ident = Ident(step["kind"], step["name"].get("namespace", ""), step["name"]["name"])
    before = world.generations[ident]

    def check() -> None:
        now = fetch(world.gateway, ident.kind, step["name"])["metadata"].get("generation", 0)
        if now == before:
            raise NotYet(f"{ident.kind} {ident.name} is still at generation {now}")

    await eventually(check, world.wait_s)


async def _live_len(world: World, step: Json, _case: Case, _number: int) -> None:
    value = look_up(fetch(world.gateway, step["kind"], step["name"]), step["path"])
    if len(value) != step["len"]:
        raise StepFailed(f"{step['path']} has {len(value)} items, wanted {step['len']}")


def _remember_live(world: World, value: Any) -> None:
    """Read each $live object when it is first named: later patches must not change it."""
    if isinstance(value, dict):
        if "$live" in value:
            _live(world, value["$live"])
        for item in value.values():
            _remember_live(world, item)
    elif isinstance(value, list):
        for item in value:
            _remember_live(world, item)


def _live(world: World, live: Json) -> Json:
    name = live["name"]
    ident = Ident(live["kind"], name.get("namespace", ""), name["name"])
    key = (*ident, live["id"])
    if key not in world.live:
        world.live[key] = world.manifests.get(ident)
    return world.live[key]


def _resolve(world: World, value: Any) -> Any:
    """The value with what is known only at run time put in. StepFailed: it is not known."""
    if isinstance(value, list):
        return [_resolve(world, item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$live" in value:
        return copy.deepcopy(look_up(_live(world, value["$live"]), value["$live"]["path"]))
    if special := [key for key in value if key.startswith("$")]:
        raise StepFailed(f"nothing here knows {special[0]}: {value[special[0]]}")
    return {key: _resolve(world, item) for key, item in value.items()}


# --- requests ------------------------------------------------------------------------------------


def target(world: World, where: Json, default_port: int | None = None) -> tuple[str, int]:
    """Address and port of a $gateway_address. Without the listener's port (host_only) it is the
    one given, or the scheme's."""
    spec = where["$gateway_address"]
    address, port = gateway_address(world.gateway, spec["gateway"], spec["listeners"])
    if spec.get("host_only"):
        port = int(spec.get("port") or default_port or port)
    return address, port


def _secret_part(world: World, value: Json | None) -> str | None:
    if value is None:
        return None
    part = value["$secretpart"]
    secret = part["secret"]
    obj = world.manifests.get(Ident("Secret", secret["namespace"], secret["name"]))
    return base64.b64decode(obj["data"][part["key"]]).decode()


async def _http_request(world: World, step: Json, _case: Case, _number: int) -> None:
    case = with_request_id(step["case"])
    check_known(case)
    tls = None
    if step["op"] == "tls_request":
        tls = TLS(
            server_name=step["tls"]["serverName"],
            ca_pem=_secret_part(world, step["tls"]["serverCertificate"]) or "",
            client_chain_pem=_secret_part(world, step["tls"]["clientCertificate"]),
            client_key_pem=_secret_part(world, step["tls"]["clientCertificateKey"]),
        )
    address, port = target(world, step["target"], 443 if tls else 80)
    request = to_request(case, address, port, tls)

    async def succeed() -> None:
        compare(case, request, await world.send(request))

    async def not_200() -> None:
        response = await world.send(request)
        if response.status == 200:
            raise StepFailed("answered 200, and must not")
        if response.status in TIMEOUTS:
            raise Mismatch(f"timed out with {response.status}")

    async def fail() -> None:
        try:
            response = await world.send(request)
        except RequestFailed:
            return
        raise Mismatch(f"answered {response.status}, and the connection should have failed")

    attempts = {"consistent": succeed, "not-200": not_200, "failure": fail}
    attempt = attempts.get(step["expect"])
    if attempt is None:
        raise StepFailed(f"nothing expects {step['expect']}")
    await converge(attempt, world.wait_s)
    await _mirrored(world, case.get("MirroredTo", ()), request.target)


async def _mirrored(world: World, backends: list[Json], uri: str) -> None:
    """Every backend has logged the request."""

    def check() -> None:
        for backend in backends:
            ref = backend["BackendRef"]
            if not world.memory.echoed(ref["Name"], ref["Namespace"], uri):
                raise NotYet(f"{ref['Name']} has not logged a request for {uri}")

    await eventually(check, world.wait_s)


async def _expect_mirrored(_world: World, step: Json, case: Case, number: int) -> None:
    """The suite starts to look here; the request with the id to look for is the next step."""
    following = case.steps[number + 1]
    wanted = following.get("case", {})
    if wanted.get("MirroredTo") != step["pods"] or wanted["Request"]["Path"] != step["path"]:
        raise StepFailed("the next step is not the request that is to be mirrored")


async def _grpc_request(world: World, step: Json, _case: Case, _number: int) -> None:
    if step["expect"] != "consistent":
        raise StepFailed(f"nothing expects {step['expect']}")
    request = to_grpc_request(step["case"], *target(world, step["target"]))

    async def attempt() -> None:
        compare_grpc(step["case"], await world.send(request))

    await converge(attempt, world.wait_s)


async def _weighted(world: World, step: Json, _case: Case, _number: int) -> None:
    sender = step["sender"]
    address, port = target(world, sender["target"])
    is_grpc = sender["protocol"] == "grpc"
    if is_grpc:
        request = to_grpc_request(sender["case"], address, port)
    else:
        request = to_request(sender["case"], address, port, None)

    await check_shares(step, lambda _: round_trip(request), _deployment_of, is_grpc=is_grpc)


def _deployment_of(pod: str) -> str:
    return pod.rsplit("-", 2)[0]


async def _sleep(_world: World, step: Json, _case: Case, _number: int) -> None:
    await asyncio.sleep(step["seconds"])


OPERATIONS: dict[str, Callable[[World, Json, Case, int], Awaitable[None]]] = {
    "k8s_assert": _assert,
    "k8s_patch": _patch,
    "k8s_apply": _apply,
    "k8s_delete": _delete,
    "assert_generation_changed": _generation_changed,
    "assert_live_len": _live_len,
    "http_request": _http_request,
    "tls_request": _http_request,
    "grpc_request": _grpc_request,
    "weighted_distribution": _weighted,
    "expect_mirrored": _expect_mirrored,
    "sleep": _sleep,
}
