"""Filters, and what of a match does not hold, in words for people."""

from __future__ import annotations

from collections.abc import Iterator

from l7proxy.route_compile import CompiledMatch, ValueCondition
from l7proxy.route_match import RequestView, path_holds
from mesh.model.routeconfig import (
    Cors,
    Filter,
    HeaderModifier,
    Mirror,
    PathModifier,
    Redirect,
    Rewrite,
)


def describe(item: Filter) -> str:
    """One line on a filter."""
    match item:
        case HeaderModifier():
            return f"{item.direction} headers: " + ", ".join(
                (
                    *(f"set {header.name}: {header.value}" for header in item.set),
                    *(f"add {header.name}: {header.value}" for header in item.add),
                    *(f"remove {name}" for name in item.remove),
                )
            )
        case Rewrite():
            parts = [f"host {item.hostname}"] if item.hostname else []
            return "rewrite to " + ", ".join(parts + _path(item.path))
        case Redirect():
            parts = [f"scheme {item.scheme}"] if item.scheme else []
            parts += [f"host {item.hostname}"] if item.hostname else []
            parts += [f"port {item.port}"] if item.port else []
            return f"redirect {item.status} to " + (", ".join(parts + _path(item.path)) or "itself")
        case Mirror():
            part = "" if item.numerator == item.denominator else " of the requests"
            share = f"{item.numerator} in {item.denominator}{part}" if part else "every request"
            return f"mirror {share} to {item.cluster}"
        case Cors():
            return "CORS for origins " + ", ".join(item.allow_origins)


def _path(modifier: PathModifier | None) -> list[str]:
    if modifier is None:
        return []
    if modifier.type == "ReplaceFullPath":
        return [f"path {modifier.value or '/'}"]
    return [f"path prefix {modifier.value or '/'}"]


def mismatches(match: CompiledMatch, view: RequestView) -> Iterator[str]:
    """What of a match does not hold, in words."""
    head = view.head
    path = head.path.decode()
    if not path_holds(match, head.path):
        if match.path_type == "Exact":
            yield f"path is {path}, not {match.path.decode()}"
        elif match.path_type == "PathPrefix":
            yield f"path is {path}, not under {match.path.decode() or '/'}"
        else:
            yield f"path is {path}, which does not match {match.path.decode()}"
    if match.method is not None and match.method != head.method:
        yield f"method is {head.method.decode()}, not {match.method.decode()}"
    for condition in match.headers:
        yield from _value(condition, view.header(condition.name), "header")
    for condition in match.query:
        yield from _value(condition, view.parameter(condition.name), "query parameter")


def _value(condition: ValueCondition, found: bytes | None, what: str) -> Iterator[str]:
    if condition.holds(found):
        return
    name, wanted = condition.name.decode(), condition.value.decode()
    if found is None:
        yield f"{what} {name} is missing"
    elif condition.regex is not None:
        yield f"{what} {name} is {found.decode(errors='replace')}, which does not match {wanted}"
    else:
        yield f"{what} {name} is {found.decode(errors='replace')}, not {wanted}"
