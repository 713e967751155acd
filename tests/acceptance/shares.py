"""Weighted backends: how many of many requests each of them answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from echo import grpc

from acceptance.client import Response
from acceptance.exchange import seen_by_backend
from acceptance.manifests import Json
from acceptance.world import StepFailed


async def check_shares(
    step: Json,
    send: Callable[[int], Awaitable[Response]],
    deployment_of: Callable[[str], str],
    *,
    is_grpc: bool,
) -> None:
    """Shares are within tolerance; chance gets as many tries as the suite gives it. `send` sends
    the n-th request. StepFailed: they are not."""
    why = ""
    for _ in range(step["retries"]):
        pods = await _answering(send, step["total_requests"], is_grpc=is_grpc)
        why = wrong_shares(Counter(map(deployment_of, pods)), step)
        if not why:
            return
    raise StepFailed(f"{why} (after {step['retries']} tries)")


async def _answering(
    send: Callable[[int], Awaitable[Response]], total: int, *, is_grpc: bool
) -> list[str]:
    """Names of the pods that answered; ten requests at a time."""
    limit = asyncio.Semaphore(10)

    async def one(number: int) -> str:
        async with limit:
            response = await send(number)
        if response.status != 200:
            raise StepFailed(f"status {response.status}")
        if is_grpc:
            return grpc.seen_by(response.body)[2]
        return str(seen_by_backend(response, "GET")["pod"])

    return await asyncio.gather(*map(one, range(total)))


def wrong_shares(counts: Counter[str], step: Json) -> str:
    """What is wrong with the shares; "" if nothing is."""
    weights, total = step["weights"], step["total_requests"]
    if unknown := counts.keys() - weights.keys():
        return f"{', '.join(sorted(unknown))} answered, which is no backend of the route"
    wrong = [
        f"{name} answered {counts[name] / total:.1%}, wanted {weight:.0%}"
        for name, weight in weights.items()
        if abs(counts[name] / total - weight) > step["tolerance"]
        or (counts[name] > 0) != (weight > 0)
    ]
    return "; ".join(wrong)
