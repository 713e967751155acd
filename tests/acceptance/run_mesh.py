"""The mesh cases: a lab of two nodes with Weft on each, requests from inside its pods."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from acceptance.cases import Case
from acceptance.cluster import api_server
from acceptance.gateway import Agent
from acceptance.manifests import Json
from acceptance.mesh_lab import LabFailed, MeshLab, why_not
from acceptance.mesh_steps import MeshWorld, run_mesh_case
from acceptance.outcomes import (
    FAIL,
    NOT_SUPPORTED,
    SKIPPED,
    Outcome,
    of_running,
    report,
    without_running,
)
from acceptance.seen import claimed_features, gone, seen
from acceptance.show import show_exchange
from acceptance.statuses import mesh_routes_accepted
from acceptance.world import eventually

_FILE = "test"
_ROUTES = ("HTTPRoute", "GRPCRoute")


async def run(cases: list[Case], args: argparse.Namespace, scratch: Path) -> list[Outcome]:
    if why := why_not():
        print(f"acceptance: the mesh cases are skipped: {why}", flush=True)
        return [without_running(case, SKIPPED, why) for case in cases]
    if args.source == "kubernetes":
        async with api_server(scratch) as kubeconfig:
            return await _run(cases, args, MeshLab(scratch, f"accept-{os.getpid()}", kubeconfig))
    return await _run(cases, args, MeshLab(scratch, f"accept-{os.getpid()}"))


async def _run(cases: list[Case], args: argparse.Namespace, lab: MeshLab) -> list[Outcome]:
    try:
        await lab.start()
        agents = list(lab.agents.values())
        claims = [await claimed_features(agent, args.wait) for agent in agents]
        world = MeshWorld(lab, frozenset.intersection(*claims), args.wait)
        for line in lab.degraded():
            print(f"acceptance: {line}", flush=True)
        outcomes = []
        for case in cases:
            if why := case.unsupported(world.claimed):
                outcome = without_running(case, NOT_SUPPORTED, why)
            else:
                outcome = await _one(world, agents, case)
            outcomes.append(outcome)
            report(outcome)
            if args.verbose and outcome.result == FAIL:
                show_exchange(world.exchange)
                print(lab.logs(), flush=True)
        return outcomes
    except LabFailed as error:
        print(f"acceptance: {error}", flush=True)
        return [without_running(case, FAIL, "the lab did not come up") for case in cases]
    finally:
        await lab.stop()


async def _one(world: MeshWorld, agents: list[Agent], case: Case) -> Outcome:
    """Apply a test's objects, run it, remove them again. Every node must have accepted its routes
    before the first request."""

    async def attempt() -> None:
        world.exchange = None
        objects = case.all_objects({})
        manifests = world.lab.manifests
        manifests.put(_FILE, objects)
        try:
            for agent in agents:
                await seen(agent, manifests.idents(_FILE), world.wait_s)
                await _accepted(agent, objects, world.wait_s)
            await run_mesh_case(world, case)
        finally:
            removed = manifests.remove(_FILE)
        for agent in agents:
            await gone(agent, removed, world.wait_s)

    return await of_running(case, attempt)


async def _accepted(agent: Agent, objects: list[Json], wait_s: float) -> None:
    def check() -> None:
        for obj in objects:
            if obj["kind"] in _ROUTES:
                mesh_routes_accepted(agent, obj)

    await eventually(check, wait_s)
