"""The same as `bench.routes`, through an API server: from the request that creates a route to the
first 200, and what agent and controller hold at thousands of routes and endpoints.

The API server is the tests' own, in Python, on the same host: its time is in the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from acceptance.cluster import NAMESPACE as WEFT
from acceptance.cluster import Api, ClusterGateway, api_server
from acceptance.gateway import GatewayFailed
from echo.answer import Pod
from echo.server import EchoServers
from kubernetes.aio import client, config
from support.keepalive import KeptConnection
from support.routes import NAMESPACE, PORT, base, route

from bench.routes import _EDGE, ADDRESS, Summary, memory, resident_mb, until_served

_GROUP = "gateway.networking.k8s.io"
_IN_A_SLICE = 100


async def measure(args: argparse.Namespace, scratch: Path) -> dict[str, object]:
    servers = EchoServers()
    pod = Pod("backend-0-0", "shop", "127.0.0.1")
    pool = f"--address-pool={ADDRESS}/32"
    options = ("--admin=off", "--access-log=off", f"--workers={args.workers}")
    async with api_server(scratch) as kubeconfig:
        api = Api(kubeconfig)
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": WEFT}})
        for obj in base(pod.address, await servers.http(pod, 0)):
            api.apply(obj)
        gateway = ClusterGateway(api, kubeconfig, scratch / "run", pool, *options)
        async with await config.new_client_from_config(str(kubeconfig)) as connection:
            try:
                await gateway.start()
                return await _measure(args, gateway, connection, api)
            finally:
                await gateway.stop()
                await servers.close()


async def _measure(
    args: argparse.Namespace, gateway: ClusterGateway, connection: client.ApiClient, api: Api
) -> dict[str, object]:
    custom = client.CustomObjectsApi(connection)

    async def create(number: int) -> None:
        obj = route(f"r{number}", f"/r{number}/")
        await custom.create_namespaced_custom_object(_GROUP, "v1", NAMESPACE, "httproutes", obj)

    memories = {"no routes": _memory(gateway)}
    print(f"creating {args.routes} routes, one by one", flush=True)
    kept = await KeptConnection.open(ADDRESS, PORT)
    taken, created = [], []
    for number in range(args.routes):
        started = time.monotonic()
        await create(number)
        created.append(time.monotonic() - started)
        await until_served(kept, f"/r{number}/x")
        taken.append(time.monotonic() - started)
        if number % 500 == 499:
            print(f"  {number + 1} routes", flush=True)
    print(f"creating {args.total - args.routes} more at once, and {args.endpoints} endpoints")
    started = time.monotonic()
    for number in range(args.routes, args.total):
        await create(number)
    for number in range(args.endpoints // _IN_A_SLICE):
        for obj in _service(number):
            api.apply(obj)
    await until_served(kept, f"/r{args.total - 1}/x")
    served_s = round(time.monotonic() - started, 2)
    await _until_attached(api, args.total)
    status_s = round(time.monotonic() - started, 2)
    await kept.close()
    memories[f"{args.total} routes, {args.endpoints} endpoints"] = _memory(gateway)
    return {
        "change_ms": {
            "all": Summary.of(taken)._asdict(),
            f"first {_EDGE}": Summary.of(taken[:_EDGE])._asdict(),
            f"last {_EDGE}": Summary.of(taken[-_EDGE:])._asdict(),
            "of that: POST": Summary.of(created)._asdict(),
        },
        "bulk": {
            "routes": args.total - args.routes,
            "last one served, s": served_s,
            "status counts all, s": status_s,
        },
        "memory_mb": memories,
    }


def _memory(gateway: ClusterGateway) -> dict[str, float]:
    return {**memory(gateway), "controller": resident_mb(gateway.controller_pid)}


def _service(number: int) -> list[dict[str, Any]]:
    """A Service with a slice full of endpoints."""
    name = f"many-{number}"
    endpoints = [{"addresses": [f"10.{number >> 8}.{number & 255}.{n}"]} for n in range(1, 101)]
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"ports": [{"port": 80}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "ports": [{"port": 80}],
            "endpoints": endpoints,
        },
    ]


async def _until_attached(api: Api, count: int) -> None:
    """Until the Gateway's status on the server counts so many routes. GatewayFailed: it takes too
    long."""
    deadline = time.monotonic() + 120
    while True:
        (found,) = api.read("Gateway", NAMESPACE, "gw")
        listeners = found.get("status", {}).get("listeners") or [{"attachedRoutes": 0}]
        if listeners[0]["attachedRoutes"] >= count:
            return
        if time.monotonic() > deadline:
            raise GatewayFailed(f"not all of {count} routes are attached: {listeners}")
        await asyncio.sleep(0.2)
