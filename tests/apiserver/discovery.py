"""Discovery and OpenAPI, as much as clients need to find kinds and to apply (api-concepts, "API
Discovery"; https://kubernetes.io/docs/concepts/overview/kubernetes-api/)."""

from __future__ import annotations

from typing import Any

from apiserver.resources import Registry, Resource

_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
VERSION = {
    "major": "1",
    "minor": "34",
    "gitVersion": "v1.34.0-weft-test",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "2025-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}


def api_versions() -> dict[str, Any]:
    """/api."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def api_groups(registry: Registry) -> dict[str, Any]:
    """/apis."""
    groups = [_group(name, list(versions)) for name, versions in registry.groups().items() if name]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def api_group(registry: Registry, name: str) -> dict[str, Any] | None:
    """/apis/GROUP."""
    versions = registry.groups().get(name)
    if versions is None:
        return None
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, list(versions))}


def _group(name: str, versions: list[str]) -> dict[str, Any]:
    listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def api_resources(registry: Registry, group: str, version: str) -> dict[str, Any] | None:
    """/api/v1 and /apis/GROUP/VERSION."""
    resources = registry.groups().get(group, {}).get(version)
    if resources is None:
        return None
    listed: list[dict[str, Any]] = []
    for one in resources:
        listed.append(
            {
                "name": one.plural,
                "singularName": one.kind.lower(),
                "namespaced": one.namespaced,
                "kind": one.kind,
                "verbs": ["create"] if one.create_only else _VERBS,
                "shortNames": list(one.short),
            }
        )
        for subresource in one.subresources:
            listed.append(
                {
                    "name": f"{one.plural}/{subresource}",
                    "singularName": "",
                    "namespaced": one.namespaced,
                    "kind": one.kind,
                    "verbs": ["get", "patch", "update"],
                }
            )
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": resources[0].api_version(version),
        "resources": listed,
    }


def aggregated(registry: Registry, *, core: bool) -> dict[str, Any]:
    """/api and /apis for who accepts APIGroupDiscoveryList ("Aggregated discovery")."""
    items = []
    for name, versions in registry.groups().items():
        if bool(name) == core:
            continue
        listed = []
        for version, resources in versions.items():
            listed.append(
                {
                    "version": version,
                    "freshness": "Current",
                    "resources": [_discovered(one, version) for one in resources],
                }
            )
        items.append({"metadata": {"name": name} if name else {}, "versions": listed})
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items,
    }


def _discovered(one: Resource, version: str) -> dict[str, Any]:
    kind = {"group": one.group, "version": version, "kind": one.kind}
    return {
        "resource": one.plural,
        "responseKind": kind,
        "scope": "Namespaced" if one.namespaced else "Cluster",
        "singularResource": one.kind.lower(),
        "verbs": ["create"] if one.create_only else _VERBS,
        "shortNames": list(one.short),
        "subresources": [
            {"subresource": name, "responseKind": kind, "verbs": ["get", "patch", "update"]}
            for name in one.subresources
        ],
    }


def openapi_index(registry: Registry) -> dict[str, Any]:
    """/openapi/v3."""
    paths = {}
    for group, versions in registry.groups().items():
        for version in versions:
            path = f"apis/{group}/{version}" if group else f"api/{version}"
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash=0"}
    return {"paths": paths}


def openapi(registry: Registry, group: str, version: str) -> dict[str, Any] | None:
    """/openapi/v3/...: what each kind's operations are, and that fields are validated by the
    server, so that clients leave it to that."""
    resources = registry.groups().get(group, {}).get(version)
    if resources is None:
        return None
    paths, schemas = {}, {}
    for one in resources:
        kind = {"group": one.group, "version": version, "kind": one.kind}
        parts = ["/apis", group] if group else ["/api"]
        parts += [version, *(("namespaces/{namespace}",) if one.namespaced else ()), one.plural]
        operation = {
            "x-kubernetes-group-version-kind": kind,
            "parameters": [
                {"name": name, "in": "query", "schema": {"type": "string"}}
                for name in ("fieldManager", "fieldValidation", "dryRun")
            ],
            "responses": {"200": {"description": "OK"}},
        }
        paths["/".join(parts)] = {
            "post": {**operation, "x-kubernetes-action": "post"},
        }
        paths["/".join([*parts, "{name}"])] = {
            "patch": {**operation, "x-kubernetes-action": "patch"},
            "put": {**operation, "x-kubernetes-action": "put"},
        }
        schemas[f"{group or 'core'}.{version}.{one.kind}"] = {
            "type": "object",
            "x-kubernetes-group-version-kind": [kind],
        }
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": VERSION["gitVersion"]},
        "paths": paths,
        "components": {"schemas": schemas},
    }
