"""What follows from a write: kinds that come and go with their definitions, garbage of deleted
namespaces and owners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apiserver.resources import Registry, of_crd
from apiserver.store import Event, Key, Raw, Store
from apiserver.target import Target, now


class Consequences:
    """`delete` is how the server deletes an object."""

    def __init__(
        self, store: Store, registry: Registry, delete: Callable[[Target, Raw], Any]
    ) -> None:
        self.store = store
        self.registry = registry
        self._delete = delete
        self._owners: set[str] = set()

    def written(self, event: Event) -> None:
        key = event.key
        if key.resource == "apiextensions.k8s.io/customresourcedefinitions":
            self._crd_written(event)
        if event.new is None:
            if key.resource == "/namespaces":
                self._drop(lambda other, obj: other.namespace == key.name)
            # "Garbage collection": what is owned goes with its last owner.
            uid = event.last["metadata"]["uid"]
            if uid in self._owners:
                self._drop(lambda other, obj: _owners(obj) == {uid})
        else:
            self._owners |= _owners(event.new)

    def _crd_written(self, event: Event) -> None:
        if event.new is None:
            spec = event.last["spec"]
            self.registry.remove(spec["group"], spec["names"]["plural"])
            ident = f"{spec['group']}/{spec['names']['plural']}"
            for key, _ in list(self.store.list(ident, None, self.store.revision)):
                self.store.delete(key)
            return
        self.registry.add(of_crd(event.new))
        if not event.new.get("status"):
            # crds: the server says so once it serves the kind.
            conditions = [
                {
                    "type": kind,
                    "status": "True",
                    "reason": reason,
                    "message": "",
                    "lastTransitionTime": now(),
                }
                for kind, reason in (
                    ("NamesAccepted", "NoConflicts"),
                    ("Established", "InitialNamesAccepted"),
                )
            ]
            spec = event.new["spec"]
            status = {
                "conditions": conditions,
                "acceptedNames": spec["names"],
                "storedVersions": [one["name"] for one in spec["versions"] if one["storage"]],
            }
            self.store.put(event.key, {**event.new, "status": status})

    def _drop(self, chosen: Callable[[Key, Raw], bool]) -> None:
        found = [
            (resource, key, obj)
            for resource in self.registry.all()
            for key, obj in self.store.list(resource.id, None, self.store.revision)
            if chosen(key, obj)
        ]
        for resource, key, _ in found:
            if self.store.get(key) is not None:
                self._delete(
                    Target(resource, resource.versions[0], key.namespace, key.name, ""), {}
                )


def _owners(obj: Raw) -> set[str]:
    return {one["uid"] for one in obj["metadata"].get("ownerReferences") or ()}
