"""Which rights Weft's roles give and to whom, out of the manifests, and asking a cluster for them.

Source: https://kubernetes.io/docs/reference/access-authn-authz/authorization/ ("Checking API
access"), https://kubernetes.io/docs/reference/access-authn-authz/rbac/. Knows no kinds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mesh.install.cluster import path_of
from mesh.sources.kubernetes_client import Client

_AT_ONCE = 16


class Right(NamedTuple):
    """One verb of one resource. `resource`: as roles name it, with its subresource; `namespace` "":
    in all of them, or of what is in none; `name` "": whatever its name."""

    verb: str
    group: str
    resource: str
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        group = f".{self.group}" if self.group else ""
        where = f" in {self.namespace}" if self.namespace else ""
        return f"{self.verb} {self.resource}{group}{name}{where}"


def of_accounts(objects: Iterable[dict[str, Any]]) -> dict[str, list[Right]]:
    """By service account ("<namespace>:<name>"), what bindings among these objects give to it."""
    found = list(objects)
    roles = {
        (one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]): one["rules"]
        for one in found
        if one["kind"] in ("ClusterRole", "Role")
    }
    result: dict[str, list[Right]] = {}
    for binding in found:
        if binding["kind"] in ("ClusterRoleBinding", "RoleBinding"):
            namespace, ref = binding["metadata"].get("namespace", ""), binding["roleRef"]
            where = namespace if ref["kind"] == "Role" else ""
            rules = roles[ref["kind"], where, ref["name"]]
            for subject in binding["subjects"]:
                account = f"{subject['namespace']}:{subject['name']}"
                result.setdefault(account, []).extend(_single(rules, namespace))
    return result


def to_apply(objects: Iterable[dict[str, Any]]) -> list[Right]:
    """What it takes to apply these: by server-side apply an object is created or patched."""
    found: dict[Right, None] = {}
    for obj in objects:
        group = obj["apiVersion"].rpartition("/")[0]
        resource = path_of(obj).split("/")[-2]
        namespace = obj["metadata"].get("namespace", "")
        for verb in ("create", "patch"):
            found[Right(verb, group, resource, namespace)] = None
    return list(found)


def _single(rules: Iterable[dict[str, Any]], namespace: str) -> Iterator[Right]:
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    for name in rule.get("resourceNames") or ("",):
                        yield Right(verb, group, resource, namespace, name)


async def missing(client: Client, rights: Iterable[Right], account: str = "") -> list[Right]:
    """Those that a service account, "" who asks, has not. ServerError: it could not be asked."""
    turn = asyncio.Semaphore(_AT_ONCE)

    async def has(right: Right) -> bool:
        async with turn:
            return await _has(client, right, account)

    asked = list(rights)
    answers = await asyncio.gather(*(has(right) for right in asked))
    return [right for right, yes in zip(asked, answers, strict=True) if not yes]


async def _has(client: Client, right: Right, account: str) -> bool:
    resource, _, subresource = right.resource.partition("/")
    attributes = {
        "group": right.group,
        "resource": resource,
        "subresource": subresource,
        "verb": right.verb,
        "namespace": right.namespace,
        "name": right.name,
    }
    kind = "SubjectAccessReview" if account else "SelfSubjectAccessReview"
    spec: dict[str, Any] = {"resourceAttributes": attributes}
    if account:
        spec["user"] = f"system:serviceaccount:{account}"
        namespace = account.partition(":")[0]
        spec["groups"] = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}"]
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
    path = f"/apis/authorization.k8s.io/v1/{kind.lower()}s"
    answer = await client.request("POST", path, {}, body)
    return bool(answer["status"]["allowed"])
