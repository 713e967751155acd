"""Who asks, and whether they may: bearer tokens and, where a test turns it on, RBAC
(https://kubernetes.io/docs/reference/access-authn-authz/rbac/)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from apiserver.errors import ApiError
from apiserver.store import Raw, Store
from apiserver.target import Target

ANONYMOUS: dict[str, Any] = {
    "username": "system:anonymous",
    "groups": ["system:unauthenticated"],
}
_GROUP = "rbac.authorization.k8s.io"


class What(NamedTuple):
    """What somebody wants to do; `resource` with its subresource, as roles name it."""

    verb: str
    group: str
    resource: str
    namespace: str | None
    name: str


class Right(NamedTuple):
    """A rule of a role as it is bound to a user. `role`: NAMESPACE/NAME, of a ClusterRole /NAME."""

    user: str
    role: str
    groups: tuple[str, ...]
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    names: tuple[str, ...]

    def allows(self, what: What) -> bool:
        def has(listed: tuple[str, ...], wanted: str) -> bool:
            return "*" in listed or wanted in listed

        return (
            has(self.verbs, what.verb)
            and has(self.groups, what.group)
            and has(self.resources, what.resource)
            # "Referring to resources": a name restricts, and create has none to compare with.
            and (not self.names or what.name in self.names)
        )


_EVERYTHING = Right("", "", ("*",), ("*",), ("*",), ())


class Auth:
    """`tokens`: user and the time (time.monotonic) at which a token expires; while there are none,
    everybody is an administrator. `denied`, `used`: what was refused, and the rights that were
    made use of."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.tokens: dict[str, tuple[dict[str, Any], float]] = {}
        self.rbac = False
        self.denied: list[str] = []
        self.used: set[Right] = set()

    def token(self, token: str, username: str, *, lasts_s: float = 1e9, **user: Any) -> None:
        """Let a token in, for a while. `user`: groups, extra (of TokenReview's UserInfo)."""
        groups = [*user.pop("groups", ()), "system:authenticated"]
        about = {"username": username, "groups": groups, **user}
        self.tokens[token] = about, time.monotonic() + lasts_s

    def service_account(self, token: str, namespace: str, name: str, **user: Any) -> None:
        """As a token of a service account is known (access-authn-authz, "Service account
        tokens")."""
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}"]
        self.token(token, f"system:serviceaccount:{namespace}:{name}", groups=groups, **user)

    def user(self, authorization: str | None) -> dict[str, Any]:
        """401: the token is unknown or has expired."""
        if not self.tokens:
            return {"username": "admin", "groups": ["system:masters", "system:authenticated"]}
        scheme, _, token = (authorization or "").partition(" ")
        if not authorization:
            return ANONYMOUS
        user, expires = self.tokens.get(token.strip(), (ANONYMOUS, 0.0))
        if scheme.lower() != "bearer" or time.monotonic() >= expires:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return user

    def check(self, user: dict[str, Any], verb: str, target: Target) -> None:
        """403: no role that is bound to the user has a rule for this."""
        resource = _resource(target)
        what = What(verb, target.resource.group, resource, target.namespace, target.name)
        if (right := self.may(user, what)) is not None:
            if right is not _EVERYTHING:
                self.used.add(right._replace(verbs=(verb,), resources=(resource,)))
            return
        where = (
            f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
        )
        text = f'{verb} resource "{resource}" in API group "{target.resource.group}" {where}'
        self.denied.append(f"{user['username']}: {text} {target.name}".strip())
        about = f'{target.resource.qualified} "{target.name}"' if target.name else resource
        message = f'{about} is forbidden: User "{user["username"]}" cannot {text}'
        raise ApiError(403, "Forbidden", message)

    def may(self, user: dict[str, Any], what: What) -> Right | None:
        """By which right; None: by none."""
        if not self.rbac or "system:masters" in user.get("groups", ()):
            return _EVERYTHING
        found = self._rights(user, what.namespace)
        return next((right for right in found if right.allows(what)), None)

    def review(self, user: dict[str, Any], body: Raw) -> Raw:
        """authorization: the answer of a SelfSubjectAccessReview (`user`: who asks) or a
        SubjectAccessReview (spec.user, spec.groups)."""
        spec = body["spec"]
        if "user" in spec:
            user = {"username": spec["user"], "groups": spec.get("groups") or []}
        about = spec["resourceAttributes"]
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        namespace = about.get("namespace") or None
        what = What(
            about["verb"], about.get("group", ""), resource, namespace, about.get("name", "")
        )
        return {**body, "status": {"allowed": self.may(user, what) is not None}}

    def granted(self, username: str) -> set[Right]:
        """Every single right that roles give to a user, one verb of one resource each."""
        return {
            right._replace(verbs=(verb,), resources=(resource,))
            for right in self._rights({"username": username, "groups": []}, None, everywhere=True)
            for verb in right.verbs
            for resource in right.resources
        }

    def _rights(
        self, user: dict[str, Any], namespace: str | None, *, everywhere: bool = False
    ) -> Iterator[Right]:
        """In a namespace, or for what is in none; those of the whole cluster first."""
        revision = self._store.revision
        within = None if everywhere else namespace
        bindings = [
            *self._store.list(f"{_GROUP}/clusterrolebindings", None, revision),
            *(
                self._store.list(f"{_GROUP}/rolebindings", within, revision)
                if namespace or everywhere
                else ()
            ),
        ]
        for key, binding in bindings:
            if not any(_is(subject, user) for subject in binding.get("subjects") or ()):
                continue
            ref = binding["roleRef"]
            where = key.namespace if ref["kind"] == "Role" else ""
            plural = "roles" if ref["kind"] == "Role" else "clusterroles"
            for other, role in self._store.list(f"{_GROUP}/{plural}", where, revision):
                for rule in role.get("rules") or () if other.name == ref["name"] else ():
                    named = tuple(rule.get("resourceNames") or ())
                    about = (tuple(rule[part]) for part in ("apiGroups", "resources", "verbs"))
                    yield Right(user["username"], f"{where}/{other.name}", *about, named)


def _resource(target: Target) -> str:
    """As roles name it."""
    subresource = f"/{target.subresource}" if target.subresource else ""
    return f"{target.resource.plural}{subresource}"


def _is(subject: Raw, user: dict[str, Any]) -> bool:
    if subject["kind"] == "ServiceAccount":
        return user["username"] == f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
    if subject["kind"] == "Group":
        return subject["name"] in user["groups"]
    return bool(subject["name"] == user["username"])
