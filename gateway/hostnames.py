"""Hostnames of listeners and routes, and their intersection (HTTPRouteSpec.hostnames)."""

from __future__ import annotations

from collections.abc import Iterable


def intersection(listener: str | None, route: Iterable[str]) -> tuple[str, ...]:
    """The hostnames that a route serves on a listener, in the route's order; empty: none in common.

    None or "" as the listener's hostname matches every host; no hostnames on the route stand for
    the listener's own, "*" for every host. Lower case comes out.
    """
    mine = listener.lower() if listener else "*"
    names = [name.lower() for name in route] or ["*"]
    common = (_narrower(mine, name) for name in names)
    return tuple(dict.fromkeys(name for name in common if name is not None))


def _narrower(one: str, other: str) -> str | None:
    if covers(one, other):
        return other
    return one if covers(other, one) else None


def covers(wide: str, narrow: str) -> bool:
    """Every host that matches `narrow` matches `wide`. "*" is every host; "*.x" is one or more
    labels before ".x"."""
    if wide == "*" or wide == narrow:
        return True
    return wide.startswith("*.") and narrow.endswith(wide[1:]) and narrow != wide[1:]
