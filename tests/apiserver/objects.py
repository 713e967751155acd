"""What the server does to objects on their way in: the rules of metadata, generation, status,
deletion. Synchronous: each write is one step, as a transaction of etcd is."""

from __future__ import annotations

import base64
import copy
import random
import string
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from apiserver import apply, schema, signing
from apiserver.consequences import Consequences
from apiserver.errors import (
    MODIFIED,
    ApiError,
    already_exists,
    bad_request,
    conflict,
    invalid,
    not_found,
)
from apiserver.resources import Registry
from apiserver.store import Key, Raw, Store
from apiserver.target import Target, now

# "Request size": etcd's limit of 1.5 MiB, and the server's of 3 MiB for a request.
MAX_OBJECT = 3 * 1024 * 1024 // 2
MAX_ANNOTATIONS = 256 * 1024


class Who(NamedTuple):
    """Who writes: the user, and the field manager."""

    manager: str
    user: dict[str, Any]


class Objects:
    """The objects of a cluster, written by its rules."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self.store = store
        self.registry = registry
        self._next_ip = 0
        store.written = Consequences(store, registry, self.delete).written

    # --- reading -----------------------------------------------------------------------------

    def get(self, target: Target) -> Raw:
        obj = self.store.get(target.key)
        if obj is None:
            raise not_found(target.resource, target.name)
        return obj

    # --- create ------------------------------------------------------------------------------

    def create(self, target: Target, obj: Raw, who: Who, *, dry_run: bool = False) -> Raw:
        """POST."""
        resource = target.resource
        obj = copy.deepcopy(obj)
        metadata = obj.setdefault("metadata", {})
        # api-conventions, "Idempotency": generateName gives a name that is not taken.
        if not metadata.get("name") and metadata.get("generateName"):
            letters = "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
            metadata["name"] = metadata["generateName"] + letters
        if not metadata.get("name"):
            causes = [("metadata.name", "FieldValueRequired", "Required value: name is required")]
            raise invalid(resource, "", causes)
        target = target._replace(name=metadata["name"])
        self._check_namespace(target, metadata)
        if metadata.get("resourceVersion"):
            raise bad_request("resourceVersion should not be set on objects to be created")
        if self.store.get(target.key) is not None:
            raise already_exists(resource, target.name)
        if resource.namespaced:
            namespace = self.store.get(Key("/namespaces", "", target.namespace or ""))
            if namespace is None:
                known = self.registry.by_id("/namespaces")
                raise not_found(known, target.namespace or "")
            if namespace["metadata"].get("deletionTimestamp"):
                text = f"unable to create new content in namespace {target.namespace} because it is"
                raise ApiError(403, "Forbidden", f"{text} being terminated")
        # crds, "Status subresource": a POST to the main resource ignores the status.
        if "status" in resource.subresources:
            obj.pop("status", None)
        obj = self._complete(target, obj)
        managed = metadata.pop("managedFields", None)
        metadata = obj["metadata"]
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = now()
        for name in ("deletionTimestamp", "deletionGracePeriodSeconds"):
            metadata.pop(name, None)
        if resource.generation:
            metadata["generation"] = 1
        self._on_create(target, obj, who)
        if managed is None:
            obj = self._owned(target, None, obj, who)
        else:
            metadata["managedFields"] = managed
        return obj if dry_run else self._put(target, obj)

    def _check_namespace(self, target: Target, metadata: Raw) -> None:
        if target.resource.namespaced:
            given = metadata.setdefault("namespace", target.namespace)
            if given != target.namespace:
                raise bad_request(
                    f"the namespace of the provided object does not match the namespace sent on "
                    f"the request ({given} != {target.namespace})"
                )
        else:
            metadata.pop("namespace", None)

    def _complete(self, target: Target, obj: Raw) -> Raw:
        """Pruned, with defaults, valid; 422 where it is not."""
        resource = target.resource
        obj = {**obj, "apiVersion": resource.api_version(target.version), "kind": resource.kind}
        if resource.custom:
            known = resource.schemas[target.version]
            obj = schema.default(schema.prune(obj, known), known)
            # A default may not be shared between objects.
            obj = copy.deepcopy(obj)
            # Of metadata the schema may say no more than that it is there.
            body = {**obj, "metadata": {}}
            if causes := schema.validate(body, known):
                raise invalid(resource, obj["metadata"]["name"], causes)
        return obj

    def _on_create(self, target: Target, obj: Raw, who: Who) -> None:
        """What built-in kinds get beside."""
        spec = obj.setdefault("spec", {}) if target.resource.kind in _WITH_SPEC else {}
        match target.resource.kind:
            case "Namespace":
                obj["status"] = {"phase": "Active"}
                labels = obj["metadata"].setdefault("labels", {})
                labels["kubernetes.io/metadata.name"] = target.name
            case "Service" if spec.get("type", "ClusterIP") != "ExternalName":
                spec.setdefault("type", "ClusterIP")
                spec.setdefault("sessionAffinity", "None")
                if not spec.get("clusterIP"):
                    self._next_ip += 1
                    spec["clusterIP"] = f"10.96.{self._next_ip >> 8}.{self._next_ip & 255}"
                spec.setdefault("clusterIPs", [spec["clusterIP"]])
                for port in spec.get("ports") or ():
                    port.setdefault("protocol", "TCP")
                    port.setdefault("targetPort", port.get("port"))
                obj["status"] = {"loadBalancer": {}}
            case "Pod":
                # The mirror of a static pod may not have one.
                if _MIRROR not in (obj["metadata"].get("annotations") or ()):
                    spec.setdefault("serviceAccountName", "default")
                obj["status"] = {"phase": "Pending"}
            case "CertificateSigningRequest":
                # csr: who asks is what the server knows, not what the request says.
                spec["username"] = who.user.get("username", "system:anonymous")
                spec["uid"] = who.user.get("uid", "")
                spec["groups"] = who.user.get("groups", ["system:unauthenticated"])
                spec["extra"] = who.user.get("extra", {})
            case "Secret" if obj.get("stringData"):
                data = obj.setdefault("data", {})
                for name, text in obj.pop("stringData").items():
                    data[name] = base64.b64encode(text.encode()).decode()

    # --- update ------------------------------------------------------------------------------

    def update(self, target: Target, obj: Raw, who: Who, *, dry_run: bool = False) -> Raw:
        """PUT."""
        live = self.get(target)
        metadata = obj.get("metadata") or {}
        if metadata.get("name") != target.name:
            raise bad_request("the name of the object does not match the name on the URL")
        self._check_namespace(target, metadata)
        self._check_version(target, live, metadata, needed=not target.resource.unconditional)
        new = self._prepared(target, live, copy.deepcopy(obj))
        new["metadata"].pop("managedFields", None)
        if "managedFields" in live["metadata"]:
            new["metadata"]["managedFields"] = live["metadata"]["managedFields"]
        return self._replace(target, live, self._owned(target, live, new, who), dry_run)

    def patch(
        self,
        target: Target,
        change: Callable[[Raw], Raw],
        who: Who,
        *,
        dry_run: bool = False,
    ) -> Raw:
        """PATCH, but for apply: `change` makes the new object of the live one."""
        live = self.get(target)
        changed = change(copy.deepcopy(live))
        # "resourceVersion" in a patch is a precondition (api-concepts, "Conflict detection").
        self._check_version(target, live, changed["metadata"], needed=False)
        new = self._prepared(target, live, changed)
        return self._replace(target, live, self._owned(target, live, new, who), dry_run)

    def apply(
        self, target: Target, config: Raw, who: Who, *, force: bool, dry_run: bool = False
    ) -> Raw:
        """PATCH of type apply (server-side-apply). An object that is not there is created."""
        if (config.get("metadata") or {}).get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        given = (config.get("metadata") or {}).get("name", target.name)
        if given != target.name:
            raise bad_request("the name of the object does not match the name on the URL")
        live = self.store.get(target.key)
        manager = apply.Manager(who.manager, "Apply", target.subresource)
        api_version = target.resource.api_version(target.version)
        if live is None:
            if target.subresource:
                raise not_found(target.resource, target.name)
            base: Raw = {"metadata": {"name": target.name}}
        else:
            base = live
        config = copy.deepcopy(config)
        if config.get("apiVersion") != api_version or config.get("kind") != target.resource.kind:
            raise bad_request(f"apply needs apiVersion {api_version}, kind {target.resource.kind}")
        if live is not None:
            given = config.get("metadata") or {}
            self._check_version(target, live, given, needed=False)
            self._check_uid(target, live, given)
        config = self._part(target, config)
        self._check_declared(target, config)
        new = apply.applied(
            base,
            config,
            manager,
            schema=self._schema(target),
            force=force,
            api_version=api_version,
            now=now(),
        )
        if live is None:
            return self.create(target, new, who, dry_run=dry_run)
        return self._replace(target, live, self._prepared(target, live, new), dry_run)

    def _check_declared(self, target: Target, config: Raw) -> None:
        """Of a field that the schema does not name nobody could say who owns it. Servers answer
        500, not 4xx (kubernetes/kubernetes issue 139253)."""
        resource = target.resource
        if not resource.custom:
            return
        found = schema.undeclared(config, resource.schemas[target.version])
        if found:
            what = f"{target.namespace}/{target.name}; {config['apiVersion']}, Kind={resource.kind}"
            why = found[0] if len(found) == 1 else "errors:" + "".join(f"\n  {x}" for x in found)
            raise ApiError(500, "", f"failed to create typed patch object ({what}): {why}")

    def _part(self, target: Target, config: Raw) -> Raw:
        """What of a configuration the endpoint lets through: the status endpoint only status, the
        main one everything else (crds, "Status subresource")."""
        if target.subresource:
            kept = {"apiVersion", "kind", "metadata", "status"}
            config = {name: value for name, value in config.items() if name in kept}
            names = ("name", "namespace", "resourceVersion")
            metadata = config.get("metadata") or {}
            config["metadata"] = {name: metadata[name] for name in names if name in metadata}
        elif "status" in target.resource.subresources:
            config = {name: value for name, value in config.items() if name != "status"}
        return config

    def _prepared(self, target: Target, live: Raw, new: Raw) -> Raw:
        """The new version of an object, with everything that a client cannot change as it was."""
        resource, before = target.resource, live["metadata"]
        self._check_uid(target, live, new["metadata"])
        managed = new["metadata"].get("managedFields")
        if target.subresource in ("status", "approval"):
            kept = new.get("status")
            if target.subresource == "approval":
                # csr: approval changes conditions only, the certificate is the signer's.
                kept = {**live.get("status", {}), "conditions": (kept or {}).get("conditions", [])}
            new = {**copy.deepcopy(live), "status": kept}
            if kept is None:
                del new["status"]
        elif "status" in resource.subresources:
            new = {name: value for name, value in new.items() if name != "status"}
            if "status" in live:
                new["status"] = live["status"]
        metadata = new["metadata"] = dict(new["metadata"])
        for name in _FIXED:
            metadata.pop(name, None)
            if name in before:
                metadata[name] = before[name]
        if managed is not None:
            metadata["managedFields"] = managed
        if before.get("deletionTimestamp"):
            added = set(metadata.get("finalizers") or ()) - set(before.get("finalizers") or ())
            if added:
                text = f"Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers {sorted(added)}"  # noqa: E501
                raise invalid(
                    resource, target.name, [("metadata.finalizers", "FieldValueForbidden", text)]
                )
        if resource.kind == "Secret" and new.get("stringData"):
            data = new.setdefault("data", {})
            for name, text in new.pop("stringData").items():
                data[name] = base64.b64encode(text.encode()).decode()
        if resource.kind == "Service":
            for name in ("clusterIP", "clusterIPs"):
                if live["spec"].get(name) and new["spec"].get("type") != "ExternalName":
                    new["spec"].setdefault(name, live["spec"][name])
        if resource.kind == "CertificateSigningRequest":
            signing.check(target, live, new)
        new = self._complete(target, new)
        if resource.generation and _spec_of(new) != _spec_of(live):
            new["metadata"]["generation"] = before["generation"] + 1
        return new

    def _check_version(self, target: Target, live: Raw, metadata: Raw, *, needed: bool) -> None:
        """api-concepts, "Conflict detection": optimistic concurrency by resourceVersion."""
        given = metadata.get("resourceVersion")
        if given and given != live["metadata"]["resourceVersion"]:
            raise conflict(target.resource, target.name, MODIFIED)
        if needed and not given:
            text = "Invalid value: 0x0: must be specified for an update"
            causes = [("metadata.resourceVersion", "FieldValueInvalid", text)]
            raise invalid(target.resource, target.name, causes)

    def _check_uid(self, target: Target, live: Raw, metadata: Raw) -> None:
        """An object of the same name is another one where its uid is (api-concepts)."""
        given, uid = metadata.get("uid"), live["metadata"]["uid"]
        if given and given != uid:
            text = f"UID in precondition: {given}, UID in object meta: {uid}"
            raise conflict(target.resource, target.name, f"Precondition failed: {text}")

    def _replace(self, target: Target, live: Raw, new: Raw, dry_run: bool) -> Raw:
        # A write that changes nothing is none: no event, no new resourceVersion.
        if _same(live, new) or dry_run:
            return live if _same(live, new) else new
        metadata = new["metadata"]
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            # finalizers: the last one gone, the object goes.
            self.store.put(target.key, new)
            return self.store.delete(target.key)
        return self._put(target, new)

    def _put(self, target: Target, obj: Raw) -> Raw:
        # "Annotations": 256 KiB altogether (ValidateAnnotationsSize).
        annotations = obj["metadata"].get("annotations") or {}
        size = sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items())
        if size > MAX_ANNOTATIONS:
            text = f"Too long: may not be more than {MAX_ANNOTATIONS} bytes"
            causes = [("metadata.annotations", "FieldValueTooLong", text)]
            raise invalid(target.resource, target.name, causes)
        if len(msgspec.json.encode(obj)) > MAX_OBJECT:
            raise ApiError(413, "RequestEntityTooLarge", "etcdserver: request is too large")
        return self.store.put(target.key, obj)

    def _schema(self, target: Target) -> dict[str, Any] | None:
        return target.resource.schemas.get(target.version)

    def _owned(self, target: Target, live: Raw | None, new: Raw, who: Who) -> Raw:
        # Each endpoint resets what is the other's, so nobody owns that by it.
        with_status = "status" in target.resource.subresources
        return apply.updated(
            live,
            new,
            apply.Manager(who.manager, "Update", target.subresource),
            schema=self._schema(target),
            api_version=target.resource.api_version(target.version),
            now=now(),
            only=(lambda path: (path[0] == "f:status") == bool(target.subresource))
            if with_status
            else (lambda path: True),
        )

    def bind(self, target: Target, binding: Raw) -> None:
        """POST of a Binding (Pod v1 core, "binding"): a pod gets its node once."""
        live = self.get(target)
        if live["spec"].get("nodeName"):
            raise conflict(target.resource, target.name, "pod is already assigned to a node")
        spec = {**live["spec"], "nodeName": binding["target"]["name"]}
        self._put(target, {**live, "spec": spec})

    # --- delete ------------------------------------------------------------------------------

    def delete(self, target: Target, options: Raw) -> tuple[Raw, bool]:
        """DELETE; the object, and whether it is gone."""
        live = self.get(target)
        metadata = live["metadata"]
        wanted = options.get("preconditions") or {}
        for name in ("uid", "resourceVersion"):
            if wanted.get(name) and wanted[name] != metadata[name]:
                raise conflict(target.resource, target.name, f"Precondition failed: {name}")
        if metadata.get("finalizers"):
            if metadata.get("deletionTimestamp"):
                return live, False
            # finalizers: the object is marked and stays until the last of them is removed.
            marks = {"deletionTimestamp": now(), "deletionGracePeriodSeconds": 0}
            if target.resource.generation:
                marks["generation"] = metadata["generation"] + 1
            return self.store.put(target.key, {**live, "metadata": {**metadata, **marks}}), False
        return self.store.delete(target.key), True


_MIRROR = "kubernetes.io/config.mirror"
_WITH_SPEC = frozenset(("Service", "Pod", "CertificateSigningRequest"))
_FIXED = (
    *("name", "namespace", "uid", "creationTimestamp", "resourceVersion", "generation"),
    *("deletionTimestamp", "deletionGracePeriodSeconds", "generateName"),
)


def _spec_of(obj: Raw) -> Raw:
    """api-conventions, "Metadata": generation is of everything but metadata and status."""
    return {k: v for k, v in obj.items() if k not in ("metadata", "status", "apiVersion")}


def _same(a: Raw, b: Raw) -> bool:
    """But for the times at which fields were last managed, which alone are no change."""

    def stripped(obj: Raw) -> Raw:
        managed = [
            {name: value for name, value in entry.items() if name != "time"}
            for entry in obj["metadata"].get("managedFields") or ()
        ]
        metadata = {**obj["metadata"], "managedFields": managed}
        return {**obj, "metadata": metadata, "apiVersion": ""}

    return stripped(a) == stripped(b)
