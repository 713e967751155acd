"""Running asynchronous tests on event loops of one's choice."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

# A test that takes longer hangs.
_LIMIT_S = 10


async def _limited(test: Coroutine[Any, Any, None]) -> None:
    """By a thread, for a virtual clock would jump over a timer of the loop."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    timer = threading.Timer(_LIMIT_S, loop.call_soon_threadsafe, [task.cancel, "hangs"])
    timer.daemon = True
    timer.start()
    try:
        await test
    finally:
        timer.cancel()


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop with real sockets whose clock can be put forward."""

    _ahead = 0.0

    def time(self) -> float:
        return super().time() + self._ahead

    def advance(self, seconds: float) -> None:
        """Timers that are due by then run in the next iterations, in their order."""
        self._ahead += seconds


def advance(seconds: float) -> None:
    """Put the running VirtualLoop's clock forward."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.advance(seconds)


def on_loops(
    *factories: Callable[[], asyncio.AbstractEventLoop],
) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Run a test once on each kind of loop."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], **arguments: Any) -> None:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(_limited(test(**arguments)))

        parameters = inspect.signature(test).parameters.values()
        first = inspect.Parameter("loop_factory", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("loop_factory", factories)(run)

    return decorate


on_both_loops = on_loops(asyncio.new_event_loop, uvloop.new_event_loop)
on_virtual_loop = on_loops(VirtualLoop)
