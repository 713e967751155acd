"""Time limits of a request that most often are none: an `asyncio.timeout` costs 4 µs, and nothing
of it is needed where there is no limit."""

from __future__ import annotations

import asyncio


class _Unlimited:
    """An `asyncio.Timeout` that never expires."""

    async def __aenter__(self) -> _Unlimited:
        return self

    async def __aexit__(self, *exception: object) -> None:
        return None

    def reschedule(self, when: float | None) -> None:
        assert when is None, "what has no limit is not given one later"


_UNLIMITED = _Unlimited()


def within(seconds: float | None) -> asyncio.Timeout | _Unlimited:
    """As `asyncio.timeout`."""
    return _UNLIMITED if seconds is None else asyncio.timeout(seconds)


def until(when: float | None) -> asyncio.Timeout | _Unlimited:
    """As `asyncio.timeout_at`."""
    return _UNLIMITED if when is None else asyncio.timeout_at(when)
