"""What an agent has seen of the objects that were written or removed."""

from __future__ import annotations

from acceptance.gateway import CLASS_NAME, Agent
from acceptance.manifests import Ident
from acceptance.statuses import NotYet
from acceptance.world import StepFailed, eventually


async def seen(agent: Agent, idents: list[Ident], wait_s: float) -> None:
    """Wait until it has the objects. Those it refuses, or whose kind it does not know, are named
    among its problems and are not waited for."""

    def check() -> None:
        refused = {(problem["kind"], problem["name"]) for problem in agent.problems()}
        for ident in idents:
            if (ident.kind, ident.name) not in refused and not agent.objects(*ident):
                raise NotYet(f"{ident.kind} {ident.namespace}/{ident.name} is not seen")

    await eventually(check, wait_s)


async def gone(agent: Agent, idents: list[Ident], wait_s: float) -> None:
    """Wait until it no longer has the objects."""

    def check() -> None:
        for ident in idents:
            if agent.objects(*ident):
                raise NotYet(f"{ident.kind} {ident.namespace}/{ident.name} is still there")

    try:
        await eventually(check, wait_s)
    except StepFailed as error:
        raise StepFailed(f"cleaning up: {error}") from error


async def claimed_features(agent: Agent, wait_s: float) -> frozenset[str]:
    """What the GatewayClass says in its status that it supports."""
    found: set[str] = set()

    def check() -> None:
        for obj in agent.objects("GatewayClass", name=CLASS_NAME):
            features = (obj.get("status") or {}).get("supportedFeatures", [])
            found.update(feature["name"] for feature in features)
        if not found:
            raise NotYet("the GatewayClass names no supported features")

    await eventually(check, wait_s)
    return frozenset(found)
