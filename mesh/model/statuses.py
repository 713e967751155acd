"""Which statuses requests are counted under: those that somebody has registered.

A backend may answer any number; it must not make a series of each. Registered are those of IANA's
"HTTP Status Codes" (2024) and the two that RFC 9110 §15.4.7 and §15.5.19 reserve.
"""

from __future__ import annotations

REGISTERED = frozenset(
    (
        *range(100, 105),
        *range(200, 209),
        226,
        *range(300, 309),
        *range(400, 419),
        *(421, 422, 423, 424, 425, 426, 428, 429, 431, 451),
        *range(500, 509),
        *(510, 511),
    )
)
# 0: the client was gone before there was one.
_CODES = ("499", *(str(one) if one in REGISTERED else f"{one // 100}xx" for one in range(1, 1000)))


def code(status: int) -> str:
    """The label: "404", or "4xx" of one that is not registered."""
    return _CODES[status]
