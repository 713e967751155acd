"""The HTTP side: routes, content types, list, watch, and everything that writes."""

from __future__ import annotations

import base64
import copy
import ssl
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import trustme
import yaml
from aiohttp import web

from apiserver import discovery, lists
from apiserver.auth import Auth
from apiserver.errors import ApiError, bad_request
from apiserver.faults import Faults
from apiserver.lists import reshaped, selected, versioned
from apiserver.objects import MAX_OBJECT, Objects, Who
from apiserver.patch import json_patch, merge_patch, strategic_patch
from apiserver.resources import SIGNERS, Registry
from apiserver.store import Key, Raw, Store
from apiserver.target import Target
from apiserver.watch import serve_watch

_BOOKMARK_S = 60.0
_encoder = msgspec.json.Encoder()


class ApiServer:
    """`async with ApiServer() as server:` listens on a free port of 127.0.0.1. The client's way in
    is `kubeconfig(path)`. Tests reach behind the API by `store`, `objects`, `faults`, `auth`."""

    def __init__(
        self, *, port: int = 0, tls: bool = False, bookmark_s: float = _BOOKMARK_S
    ) -> None:
        self.store = Store()
        self.registry = Registry()
        self.objects = Objects(self.store, self.registry)
        self.faults = Faults()
        self.auth = Auth(self.store)
        self.bookmark_s = bookmark_s
        # Method and path, and path and Accept.
        self.requests: list[tuple[str, str]] = []
        self.accepted: list[tuple[str, str]] = []
        # Requests for a path that are being answered, and the most that there were at once.
        self.open: Counter[str] = Counter()
        self.most_open: Counter[str] = Counter()
        self.port = port
        self._tls = tls
        self._authority = trustme.CA() if tls else None
        app = web.Application(client_max_size=2 * MAX_OBJECT)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        for name in ("default", "kube-system"):
            self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    async def __aenter__(self) -> ApiServer:
        await self._runner.setup()
        await self.listen()
        return self

    async def __aexit__(self, *about: object) -> None:
        await self._runner.cleanup()

    async def listen(self) -> None:
        context = None
        if self._authority is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop_listening(self) -> None:
        """New connections are refused, and those that are open closed."""
        for site in list(self._runner.sites):
            await site.stop()
        self.cut_connections()

    def cut_connections(self) -> None:
        """All that there are; with `faults.away` new ones are too."""
        assert self._runner.server is not None
        for connection in list(self._runner.server.connections):
            connection.force_close()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def kubeconfig(self, path: Path, *, token: str = "admin") -> Path:
        """Write a kubeconfig for this server."""
        cluster: Raw = {"server": self.url}
        if self._authority is not None:
            pem = self._authority.cert_pem.bytes()
            cluster["certificate-authority-data"] = base64.b64encode(pem).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # --- for tests: objects past HTTP ------------------------------------------------------------

    def target(self, obj: Raw, subresource: str = "") -> Target:
        """Where an object belongs, by its apiVersion and kind."""
        group, _, version = obj["apiVersion"].rpartition("/")
        for resource in self.registry.all():
            if (resource.group, resource.kind) == (group, obj["kind"]):
                metadata = obj["metadata"]
                namespace = metadata.get("namespace", "default") if resource.namespaced else None
                return Target(resource, version, namespace, metadata.get("name", ""), subresource)
        raise KeyError(obj["kind"])

    def create(self, obj: Raw) -> Raw:
        return self.objects.create(self.target(obj), obj, Who("test", {}))

    def change(self, obj: Raw, patch: Raw, subresource: str = "") -> Raw:
        """Merge-patch an object (apiVersion, kind, metadata.name say which)."""
        target = self.target(obj, subresource)
        return self.objects.patch(target, lambda live: merge_patch(live, patch), Who("test", {}))

    def delete(self, obj: Raw) -> None:
        self.objects.delete(self.target(obj), {})

    def get(self, resource: str, name: str, namespace: str = "default") -> Raw | None:
        """`resource`: GROUP/PLURAL. The caller's own copy."""
        return copy.deepcopy(self.store.get(Key(resource, namespace, name)))

    def install_crds(self, directory: Path) -> None:
        """Every CustomResourceDefinition in the files of a directory."""
        for document in _crds(directory):
            self.create(document)

    # --- requests --------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        self.accepted.append((request.path, request.headers.get("Accept", "")))
        self.open[request.path] += 1
        self.most_open[request.path] = max(self.most_open[request.path], self.open[request.path])
        try:
            await self.faults.before(request.path)
            if (body := self.faults.instead(request.path)) is not None:
                return web.Response(body=body, content_type="application/json")
            answer = await self._answer(request)
            await self.faults.after(request.method, request.path)
            return answer
        except ApiError as error:
            return _json(error.status, status=error.code, headers=error.headers)
        except ConnectionError:
            if request.transport is not None:
                request.transport.abort()
            raise
        finally:
            self.open[request.path] -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if (found := self._document(request, parts)) is not None:
            return found
        user = self.auth.user(request.headers.get("Authorization"))
        target = self._target(parts)
        method = request.method
        if method == "GET" and not target.name:
            return await self._read_many(request, target, user)
        verb = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch"}.get(method)
        if method == "DELETE":
            verb = "delete" if target.name else "deletecollection"
        if verb is None:
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method")
        self.auth.check(user, verb, target)
        if target.resource.kind == "CertificateSigningRequest" and target.subresource:
            # csr, "Authorization": admission asks for rights on the signer's name as well.
            right = {"approval": "approve", "status": "sign"}[target.subresource]
            signer = self.objects.get(target)["spec"]["signerName"]
            self.auth.check(user, right, Target(SIGNERS, "v1", None, signer, ""))
        if target.resource.kind == "ClusterTrustBundle" and verb in ("create", "update", "patch"):
            # ClusterTrustBundles: admission asks whether this user may attest for the signer.
            signer = ":".join(target.name.split(":")[:-1]).replace(":", "/")
            self.auth.check(user, "attest", Target(SIGNERS, "v1", None, signer, ""))
        if verb == "get":
            return _shown(request, target, self.objects.get(target))
        if verb == "deletecollection":
            return self._delete_many(request, target)
        if verb == "delete":
            options = await _body(request) if request.can_read_body else {}
            obj, gone = self.objects.delete(target, options)
            return _json(_success(target, obj) if gone else versioned(target, obj))
        manager = request.query.get("fieldManager") or _manager(request)
        who, dry_run = Who(manager, user), request.query.get("dryRun") == "All"
        if verb == "create":
            if target.subresource == "binding":
                self.objects.bind(target, await _body(request))
                return _json(_success(target, self.objects.get(target)), status=201)
            if target.name:
                raise ApiError(405, "MethodNotAllowed", "the server does not allow this method")
            body = await _body(request)
            if target.resource.kind.endswith("SubjectAccessReview"):
                return _json(self.auth.review(user, body), status=201)
            made = self._create(target, body, who, dry_run)
            return _shown(request, target, made, status=201)
        if verb == "update":
            updated = self.objects.update(target, await _body(request), who, dry_run=dry_run)
            return _shown(request, target, updated)
        return await self._patch(request, target, who, dry_run)

    def _create(self, target: Target, body: Raw, who: Who, dry_run: bool) -> Raw:
        expected = target.resource.api_version(target.version)
        if body.get("apiVersion", expected) != expected or body.get("kind") not in (
            None,
            target.resource.kind,
        ):
            raise bad_request(f"expected {expected} {target.resource.kind}")
        dry_run = dry_run or target.resource.create_only
        return self.objects.create(target, body, who, dry_run=dry_run)

    async def _patch(
        self, request: web.Request, target: Target, who: Who, dry_run: bool
    ) -> web.StreamResponse:
        """api-concepts, "Patch mechanisms": the content type says which."""
        kind = request.content_type
        if kind == "application/apply-patch+yaml":
            if not request.query.get("fieldManager"):
                raise bad_request("fieldManager is required for apply patch")
            config = yaml.load(await request.text(), yaml.CSafeLoader)
            before = self.store.get(target.key)
            if before is None:
                # server-side-apply, "API implementation": who creates by it needs both verbs.
                self.auth.check(who.user, "create", target)
            force = request.query.get("force") == "true"
            obj = self.objects.apply(target, config, who, force=force, dry_run=dry_run)
            return _shown(request, target, obj, status=200 if before else 201)
        patch = await _body(request)
        match kind:
            case "application/json-patch+json":
                change = lambda live: json_patch(live, patch)  # noqa: E731
            case "application/merge-patch+json":
                change = lambda live: merge_patch(live, patch)  # noqa: E731
            case "application/strategic-merge-patch+json" if not target.resource.custom:
                change = lambda live: strategic_patch(live, patch)  # noqa: E731
            case _:
                text = "the body of the request was in an unknown format"
                raise ApiError(415, "UnsupportedMediaType", text)
        return _shown(request, target, self.objects.patch(target, change, who, dry_run=dry_run))

    def _delete_many(self, request: web.Request, target: Target) -> web.Response:
        chosen = selected(request, target)
        found = list(self.store.list(target.resource.id, target.namespace, self.store.revision))
        for key, obj in found:
            if chosen(obj):
                self.objects.delete(target._replace(name=key.name, namespace=key.namespace), {})
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    def _document(self, request: web.Request, parts: list[str]) -> web.Response | None:
        """What is not about objects: discovery, health, version."""
        registry = self.registry
        wants = request.headers.get("Accept", "")
        in_groups = "as=APIGroupDiscoveryList" in wants
        found: Any
        match parts:
            case ["version"]:
                found = discovery.VERSION
            case ["readyz" | "livez" | "healthz"]:
                return web.Response(text="ok")
            case ["api" | "apis" as root] if in_groups:
                found = discovery.aggregated(registry, core=root == "api")
                kind = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
                return web.Response(body=_encoder.encode(found), headers={"Content-Type": kind})
            case ["api"]:
                found = discovery.api_versions()
            case ["apis"]:
                found = discovery.api_groups(registry)
            case ["api", version]:
                found = discovery.api_resources(registry, "", version)
            case ["apis", group]:
                found = discovery.api_group(registry, group)
            case ["apis", group, version]:
                found = discovery.api_resources(registry, group, version)
            case ["openapi", "v3"]:
                found = discovery.openapi_index(registry)
            case ["openapi", "v3", "api", version]:
                found = discovery.openapi(registry, "", version)
            case ["openapi", "v3", "apis", group, version]:
                found = discovery.openapi(registry, group, version)
            case _:
                return None
        if found is None:
            raise _no_such_path()
        return _json(found)

    def _target(self, parts: list[str]) -> Target:
        match parts:
            case ["api", version, *rest]:
                group = ""
            case ["apis", group, version, *rest]:
                pass
            case _:
                raise _no_such_path()
        namespace: str | None = None
        # /namespaces/NAME is the object itself; what follows it is in the namespace, but for its
        # own subresources.
        if len(rest) > 2 and rest[0] == "namespaces" and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource, *more = (*rest, "", "", "")
        resource = self.registry.find(group, version, plural)
        if (
            resource is None
            or any(more)
            or (subresource and subresource not in resource.subresources)
        ):
            raise _no_such_path()
        if resource.namespaced and name and namespace is None:
            raise _no_such_path()
        if not resource.namespaced and namespace is not None:
            raise _no_such_path()
        return Target(resource, version, namespace, name, subresource)

    # --- list and watch --------------------------------------------------------------------------

    async def _read_many(
        self, request: web.Request, target: Target, user: Mapping[str, Any]
    ) -> web.StreamResponse:
        query = request.query
        watching = query.get("watch") in ("true", "1")
        fields = query.get("fieldSelector", "")
        # An authorizer is told the one name that a field selector asks for (rbac, "Referring to
        # resources": list and watch may be restricted by resourceNames that way).
        named = fields.removeprefix("metadata.name=") if fields.startswith("metadata.name=") else ""
        about = target._replace(name=named)
        self.auth.check(dict(user), "watch" if watching else "list", about)
        if watching:
            return await serve_watch(
                self, request, target, selected(request, target), reshaped(request)
            )
        return self._list(request, target)

    def _list(self, request: web.Request, target: Target) -> web.Response:
        return lists.answer(self.store, request, target)


@cache
def _crds(directory: Path) -> tuple[Raw, ...]:
    return tuple(
        document
        for file in sorted(directory.glob("*.yaml"))
        for document in yaml.load_all(file.read_text(), yaml.CSafeLoader)
        if document and document.get("kind") == "CustomResourceDefinition"
    )


def _shown(request: web.Request, target: Target, obj: Raw, *, status: int = 200) -> web.Response:
    return _json(reshaped(request)(versioned(target, obj)), status=status)


def _success(target: Target, obj: Raw) -> Raw:
    details = {
        "name": obj["metadata"]["name"],
        "group": target.resource.group,
        "kind": target.resource.plural,
        "uid": obj["metadata"]["uid"],
    }
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": details,
    }


async def _body(request: web.Request) -> Any:
    text = await request.read()
    try:
        if "yaml" in request.content_type:
            return yaml.load(text, yaml.CSafeLoader)
        return msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, yaml.YAMLError) as error:
        raise bad_request(f"cannot decode the body: {error}") from None


def _manager(request: web.Request) -> str:
    """server-side-apply, "Managers": the user agent up to the slash where none is given."""
    return request.headers.get("User-Agent", "unknown").partition("/")[0]


def _no_such_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def _json(
    value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=_encoder.encode(value),
        status=status,
        content_type="application/json",
        headers=headers or None,
    )
