"""What goes wrong on purpose: a test sets these while the server runs."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from apiserver.errors import ApiError


@dataclass
class Faults:
    """All off at first. Shares are 0..1 of the requests that `about` (a part of the path, "" all)
    names.

    `cut_watches`: how many more watches end after a random number of events, up to `cut_after`;
    half of them in the middle of a line. `refuse`: share of requests answered with one of `codes`.
    `delay_s`: before every request is looked at; `late_s`: before a PUT that has taken effect is
    answered. `away`: connections are closed without an answer.
    `once`: for a part of a path, the code that the next request for such a path gets.
    `garbage`: for a part of a path, what all requests for such paths get, as a success.
    `gone_as_status`: a watch from a compacted version gets 410 as its answer, not as an event; real
    servers do either. `gone_code`: the code of that event, where the server does not know why.
    """

    about: str = ""
    cut_watches: int = 0
    cut_after: int = 3
    refuse: float = 0.0
    codes: tuple[int, ...] = (429, 500, 503)
    delay_s: float = 0.0
    late_s: float = 0.0
    once: dict[str, int] = field(default_factory=dict)
    garbage: dict[str, bytes] = field(default_factory=dict)
    away: bool = False
    gone_as_status: bool = False
    gone_code: int = 410
    random: random.Random = field(default_factory=lambda: random.Random(1))
    cuts: int = 0
    refused: int = 0

    async def before(self, path: str) -> None:
        """Called with each request. ApiError: it is refused; ConnectionError: nobody answers."""
        if self.away:
            raise ConnectionError("the server is away")
        for part in [part for part in self.once if part in path]:
            raise ApiError(self.once.pop(part), "Conflict", "refused on purpose")
        if self.about not in path:
            return
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.refuse and self.random.random() < self.refuse:
            self.refused += 1
            code = self.random.choice(self.codes)
            # api-conventions, "HTTP Status codes": 429 tells when to come again.
            headers = {"Retry-After": "0"} if code == 429 else {}
            reason = {429: "TooManyRequests", 503: "ServiceUnavailable"}.get(code, "InternalError")
            raise ApiError(code, reason, "refused on purpose", headers=headers)

    async def after(self, method: str, path: str) -> None:
        """Called before what has been done is answered."""
        if self.late_s and method == "PUT" and self.about in path:
            await asyncio.sleep(self.late_s)

    def instead(self, path: str) -> bytes | None:
        """The body that a request gets in place of its answer."""
        return next((body for part, body in self.garbage.items() if part in path), None)

    def lifetime(self, path: str) -> int | None:
        """After how many events a new watch is cut; None: never."""
        if self.cut_watches <= 0 or self.about not in path:
            return None
        return self.random.randint(0, self.cut_after)
