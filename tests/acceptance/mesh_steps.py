"""Runs the steps of a mesh case: every request from every pod that the case may mean, over IPv4 and
IPv6. A step that nothing here handles fails its case."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from echo import grpc

from acceptance.cases import Case, guarded
from acceptance.client import TLS, Request, RequestFailed, Response
from acceptance.exchange import (
    Mismatch,
    compare_grpc,
    grpc_code,
    seen_by_backend,
    to_grpc_request,
)
from acceptance.exchange import check_known as check_known_case
from acceptance.inside import send_from
from acceptance.manifests import Json
from acceptance.mesh_exchange import compare_mesh, completed, split_host, to_mesh_request
from acceptance.mesh_lab import MeshLab, MeshPod, deployment_of
from acceptance.shares import check_shares
from acceptance.steps import in_step
from acceptance.world import StepFailed, converge

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(slots=True)
class MeshWorld:
    """What the steps act on. `exchange` is for people: the last that failed."""

    lab: MeshLab
    claimed: frozenset[str]
    wait_s: float
    exchange: tuple[Request, Response | RequestFailed] | None = None


class _Sender(NamedTuple):
    """A pod, and the family of the addresses that it connects to."""

    pod: MeshPod
    family: int

    @property
    def address(self) -> str:
        return self.pod.addresses[_FAMILIES.index(self.family)]

    def __str__(self) -> str:
        version = 4 if self.family == socket.AF_INET else 6
        return f"{self.pod.namespace}/{self.pod.name} on node {self.pod.node} over IPv{version}"


async def run_mesh_case(world: MeshWorld, case: Case) -> None:
    """StepFailed: it failed, and where."""
    if not case.steps:
        raise StepFailed("the test data has no steps for this test, and none are written by hand")
    for number, step in enumerate(case.steps):
        if not guarded(step, world.claimed):
            continue
        operation = OPERATIONS.get(step["op"])
        try:
            if operation is None:
                raise StepFailed("nothing handles this step")
            await operation(world, step)
        except Exception as error:
            raise in_step(number, step, error) from error


def _senders(world: MeshWorld, client: Json) -> list[_Sender]:
    labels = dict(pair.split("=", 1) for pair in client["app"].split(","))
    pods = world.lab.pods_of(client["namespace"], labels)
    if not pods:
        raise StepFailed(f"no pod of {client['namespace']} has the labels {client['app']}")
    return [_Sender(pod, family) for pod in pods for family in _FAMILIES]


async def _each(
    world: MeshWorld, senders: list[_Sender], attempt: Callable[[_Sender], Awaitable[None]]
) -> None:
    """All senders at once, three times in a row. StepFailed: one of them does not get there."""

    async def named(sender: _Sender) -> None:
        try:
            await attempt(sender)
        except (Mismatch, RequestFailed) as error:
            raise Mismatch(f"from {sender}: {error}") from error

    async def all_of_them() -> None:
        results = await asyncio.gather(*map(named, senders), return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    await converge(all_of_them, world.wait_s)


async def _send(world: MeshWorld, sender: _Sender, request: Request) -> Response:
    try:
        response = await send_from(sender.pod.socket, request)
    except RequestFailed as error:
        world.exchange = (request, error)
        raise
    world.exchange = (request, response)
    return response


async def _mesh_request(world: MeshWorld, step: Json) -> None:
    if step["expect"] != "consistent":
        raise StepFailed(f"nothing expects {step['expect']}")
    check_known_case(step["case"])
    namespace = step["client"]["namespace"]
    for case in _with_pod_addresses(world, step["case"], namespace):
        complete = completed(case, namespace)
        address, _ = split_host(complete["To"])
        senders = [
            sender
            for sender in _senders(world, step["client"])
            if not _is_address(address) or _is_of(address, sender.family)
        ]

        async def attempt(sender: _Sender, general: Json = complete) -> None:
            case = _with_client_address(general, sender)
            request = to_mesh_request(case, sender.family)
            compare_mesh(case, request, await _send(world, sender, request))

        await _each(world, senders, attempt)


def _with_pod_addresses(world: MeshWorld, case: Json, namespace: str) -> Iterator[Json]:
    """The case for each address of the pods that its Host means, or as it is."""
    host = case["Request"].get("Host")
    if not isinstance(host, dict):
        yield case
        return
    pods = [pod for pod in world.lab.pods_of(namespace, {}) if pod.deployment == host["$pod"]]
    if not pods:
        raise StepFailed(f"no pods of {host['$pod']}")
    for address in itertools.chain.from_iterable(pod.addresses for pod in pods):
        authority = f"[{address}]" if ":" in address else address
        request = {**case["Request"], "Host": f"{authority}:{host['port']}"}
        yield {**case, "Request": request}


def _with_client_address(case: Json, sender: _Sender) -> Json:
    text = json.dumps(case).replace("__CLIENT_ADDRESS__", sender.address)
    result: Json = json.loads(text)
    return result


def _is_address(name: str) -> bool:
    return any(_is_of(name, family) for family in _FAMILIES)


def _is_of(address: str, family: int) -> bool:
    try:
        socket.inet_pton(family, address)
    except OSError:
        return False
    return True


def _grpc(case: Json, family: int) -> Request:
    request = to_grpc_request(case, *split_host(case["Host"]))
    return dataclasses.replace(request, family=family)


async def _grpc_request(world: MeshWorld, step: Json) -> None:
    async def attempt(sender: _Sender) -> None:
        compare_grpc(step["case"], await _send(world, sender, _grpc(step["case"], sender.family)))

    await _each(world, _senders(world, step["client"]), attempt)


async def _weighted(world: MeshWorld, step: Json) -> None:
    """The senders take turns."""
    spec = step["sender"]
    is_grpc = spec["protocol"] == "grpc"
    case = spec["case"] if is_grpc else completed(spec["case"], spec["client"]["namespace"])
    to_request = _grpc if is_grpc else to_mesh_request
    senders = _senders(world, spec["client"])

    async def send(number: int) -> Response:
        sender = senders[number % len(senders)]
        return await _send(world, sender, to_request(case, sender.family))

    await check_shares(step, send, deployment_of, is_grpc=is_grpc)


async def _spread(world: MeshWorld, step: Json) -> None:
    """From each sender many requests, of which none fails; every pod that should answers some."""
    pods = {pod.name for pod in world.lab.pods if pod.deployment in step["backends"]}
    await asyncio.gather(
        *(_spread_from(world, sender, step, pods) for sender in _senders(world, step["client"]))
    )


async def _spread_from(world: MeshWorld, sender: _Sender, step: Json, pods: set[str]) -> None:
    request, pod_of = PROTOCOLS[step["protocol"]](world, step["host"])
    request = dataclasses.replace(request, family=sender.family)
    answering = set()
    for number in range(step["requests"]):
        try:
            answering.add(pod_of(await _send(world, sender, request)))
        except (Mismatch, RequestFailed) as error:
            raise StepFailed(f"from {sender}, request {number + 1}: {error}") from error
    if answering != pods:
        silent = ", ".join(sorted(pods - answering)) or "none is silent"
        others = ", ".join(sorted(answering - pods)) or "nobody"
        raise StepFailed(f"from {sender}: never {silent}; of others {others} answered")


_Asking = tuple[Request, Callable[[Response], str]]


def _http_pod(response: Response) -> str:
    if response.status != 200:
        raise Mismatch(f"status {response.status}; body {response.body[:200]!r}")
    return str(seen_by_backend(response, "GET")["pod"])


def _grpc_pod(response: Response) -> str:
    if code := grpc_code(response):
        raise Mismatch(f"gRPC status {code} (HTTP {response.status})")
    return grpc.seen_by(response.body)[2]


def _http_asking(_world: MeshWorld, host: str) -> _Asking:
    return Request(*split_host(host), host=host), _http_pod


def _tls_asking(world: MeshWorld, host: str) -> _Asking:
    name, port = split_host(host)
    return Request(name, port, host=name, tls=TLS(name, world.lab.ca_pem)), _http_pod


def _grpc_asking(_world: MeshWorld, host: str) -> _Asking:
    return to_grpc_request({"EchoRequest": {}}, *split_host(host)), _grpc_pod


def _tcp_asking(_world: MeshWorld, host: str) -> _Asking:
    request = Request(*split_host(host), body=b"line\n", protocol="TCP")
    return request, lambda response: response.body.decode().removesuffix(" line\n")


PROTOCOLS: dict[str, Callable[[MeshWorld, str], _Asking]] = {
    "http": _http_asking,
    "tls": _tls_asking,
    "grpc": _grpc_asking,
    "tcp": _tcp_asking,
}

OPERATIONS: dict[str, Callable[[MeshWorld, Json], Awaitable[None]]] = {
    "mesh_request": _mesh_request,
    "grpc_request": _grpc_request,
    "weighted_distribution": _weighted,
    "spread": _spread,
}
