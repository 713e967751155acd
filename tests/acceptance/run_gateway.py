"""The gateway cases: `weft up` on this host, echo pods on loopback addresses."""

from __future__ import annotations

import argparse
from pathlib import Path

from echo.server import EchoServers

from acceptance import hand
from acceptance.cases import SHARED, Case, load_objects
from acceptance.cluster import NAMESPACE, Api, ClusterGateway, ClusterManifests, api_server
from acceptance.credentials import credentials
from acceptance.gateway import CLASS_NAME, POOL, GatewayProcess
from acceptance.manifests import Json, Manifests
from acceptance.outcomes import FAIL, NOT_SUPPORTED, Outcome, of_running, report, without_running
from acceptance.pods import Pods
from acceptance.seen import claimed_features, gone, seen
from acceptance.show import show_exchange
from acceptance.statuses import CONTROLLER
from acceptance.steps import run_case
from acceptance.world import World

# What runs containers is the runner's business, not the gateway's.
_NOT_FOR_WEFT = ("Deployment",)
_REPLACEMENTS = {
    "{GATEWAY_CLASS_NAME}": CLASS_NAME,
    "{GATEWAY_CONTROLLER_NAME}": CONTROLLER,
    **hand.PLACEHOLDERS,
}


async def run(cases: list[Case], args: argparse.Namespace, scratch: Path) -> list[Outcome]:
    """GatewayFailed, OSError: the gateway or the pods did not come up."""
    pool = f"--address-pool={POOL}"
    options = ("--admin=off", f"--access-log={'json' if args.verbose else 'off'}")
    if args.source == "kubernetes":
        async with api_server(scratch) as kubeconfig:
            api = Api(kubeconfig)
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
            api.apply(namespace)
            gateway = ClusterGateway(api, kubeconfig, scratch / "run", pool, *options)
            return await _run(cases, args, ClusterManifests(api), gateway)
    directory = scratch / "manifests"
    directory.mkdir()
    plain = GatewayProcess(directory, scratch / "run", pool, *options)
    return await _run(cases, args, Manifests(directory), plain)


async def _run(
    cases: list[Case], args: argparse.Namespace, manifests: Manifests, gateway: GatewayProcess
) -> list[Outcome]:
    servers = EchoServers()
    pods = Pods(servers)
    try:
        manifests.put("credentials", credentials())
        await _deploy(pods, manifests, "base", _base_objects())
        await gateway.start()
        world = World(gateway, manifests, pods, servers.memory, frozenset(), args.wait)
        world.claimed = await claimed_features(gateway, args.wait)
        outcomes = []
        for case in cases:
            outcome = await _one(world, case)
            outcomes.append(outcome)
            report(outcome)
            if args.verbose and outcome.result == FAIL:
                show_exchange(world.exchange)
                print("    the gateway's log:", gateway.log_tail(), sep="\n", flush=True)
        return outcomes
    finally:
        await gateway.stop()
        await servers.close()


def _base_objects() -> list[Json]:
    gateway_class = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": CLASS_NAME},
        "spec": {"controllerName": CONTROLLER},
    }
    return [gateway_class, *load_objects(SHARED / "conformance/base/manifests.yaml", _REPLACEMENTS)]


async def _deploy(pods: Pods, manifests: Manifests, file: str, objects: list[Json]) -> None:
    """Start the pods of a manifest, and write what else there is, with EndpointSlices."""
    for obj in objects:
        if obj["kind"] == "Deployment":
            await pods.deploy(obj, manifests)
    slices = [pods.endpoint_slice(obj) for obj in objects if obj["kind"] == "Service"]
    for_weft = [obj for obj in objects if obj["kind"] not in _NOT_FOR_WEFT]
    manifests.put(file, [*for_weft, *filter(None, slices)])


async def _one(world: World, case: Case) -> Outcome:
    """Apply a test's objects, run it, remove them again."""
    if why := case.unsupported(world.claimed):
        return without_running(case, NOT_SUPPORTED, why)
    world.file = "test"

    async def attempt() -> None:
        objects = case.all_objects(_REPLACEMENTS)
        try:
            await _deploy(world.pods, world.manifests, world.file, objects)
            await seen(world.gateway, world.manifests.idents(world.file), world.wait_s)
            await run_case(world, case)
        finally:
            removed = world.manifests.remove(world.file)
        await gone(world.gateway, removed, world.wait_s)

    return await of_running(case, attempt)
