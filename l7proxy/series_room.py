"""Room for series of requests that pass by the proxy (l7proxy.series): those that nobody uses go.

What the kernel has counted of them the worker adds to its own metrics first: no request is lost, or
is counted twice, unless the worker is killed between the two.
"""

from __future__ import annotations

import asyncio

from l7proxy import metrics
from l7proxy.handles import Kernel
from l7proxy.record import count_passed
from l7proxy.series import Numbered, Series, SeriesNumbers
from l7proxy.tasks import spawn

# Between two looks for what nobody uses, in seconds: much longer than what has begun to pass by an
# offer takes once that is withdrawn.
_LOOK_S = 10.0
# So many at once, then others have their turn.
_AT_ONCE = 64


class SeriesRoom:
    def __init__(self, numbers: SeriesNumbers, kernel: Kernel, look_s: float = _LOOK_S) -> None:
        self._numbers = numbers
        self._kernel = kernel
        self._look_s = look_s
        self._looking = False

    def number(self, series: Series) -> Numbered | None:
        """As `SeriesNumbers.number`."""
        found = self._numbers.number(series)
        if self._numbers.many and not self._looking:
            self._looking = True
            spawn(self._look(), name="series")
        self._tell()
        return found

    def _tell(self) -> None:
        metrics.SERIES.set(len(self._numbers))
        metrics.SERIES_FULL.set(self._numbers.full)

    async def _look(self) -> None:
        """As long as there are many."""
        try:
            while self._numbers.many:
                if (unused := self._numbers.unused()) and await self._counted(unused):
                    await self._numbers.forget(unused)
                    self._tell()
                await asyncio.sleep(self._look_s)
        finally:
            self._looking = False

    async def _counted(self, series: dict[int, Series]) -> bool:
        """Count here what the kernel has counted. False: there is no kernel to ask."""
        handles = self._kernel.handles
        if handles is None:
            return False
        keys = await asyncio.to_thread(handles.counted, series)
        for at, key in enumerate(keys, 1):
            passed = handles.take_counted(key)
            if passed is not None:
                count_passed(series[key.series], key, passed)
            if at % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return True
