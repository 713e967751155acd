"""Filters in words, for people who ask what happens to a request."""

from __future__ import annotations

from mesh.model.nodeconfig import (
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
