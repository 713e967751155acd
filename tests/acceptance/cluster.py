"""`make acceptance SOURCE=kubernetes`: the same cases through an API server, the project's own, or
the one that WEFT_TEST_KUBECONFIG leads to. Objects go there and statuses are read back from there,
both with the kubernetes client; `weft up --kubeconfig` serves, `weft controller` writes statuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import config
from kubernetes.client.exceptions import ApiException
from kubernetes.dynamic import DynamicClient

from acceptance.cases import SHARED
from acceptance.gateway import POLL_S, Agent, GatewayFailed, GatewayProcess
from acceptance.manifests import Ident, Json, Manifests

NAMESPACE = "weft-system"
# As in deploy/: nodes read the controller's copies of Secrets.
_SECRETS = "weft-system-secrets"
_TESTS = Path(__file__).resolve().parents[1]
_VERSIONS = {
    **dict.fromkeys(("Namespace", "Service", "Secret", "ConfigMap", "Pod", "Node"), "v1"),
    "EndpointSlice": "discovery.k8s.io/v1",
}
_CLUSTER_SCOPED = ("Namespace", "Node", "GatewayClass")


@contextlib.asynccontextmanager
async def api_server(scratch: Path) -> AsyncIterator[Path]:
    """The kubeconfig of an API server that has the Gateway API's CRDs."""
    if given := os.environ.get("WEFT_TEST_KUBECONFIG"):
        yield Path(given)
        return
    file = scratch / "kubeconfig"
    # Of a server before this one.
    file.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "apiserver", f"--kubeconfig={file}"),
        f"--crds={SHARED / 'crds/experimental'}",
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
    )
    try:
        async with asyncio.timeout(20):
            while not file.exists():
                if process.returncode is not None:
                    raise GatewayFailed("the API server ended")
                await asyncio.sleep(POLL_S)
        yield file
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


class Api:
    """Objects by the kubernetes client."""

    def __init__(self, kubeconfig: Path) -> None:
        urllib3.disable_warnings()
        self._client = DynamicClient(config.new_client_from_config(str(kubeconfig)))
        self._namespaces: set[str] = set()

    def _resource(self, kind: str) -> Any:
        version = _VERSIONS.get(kind, "gateway.networking.k8s.io/v1")
        return self._client.resources.get(api_version=version, kind=kind)

    def apply(self, obj: Json) -> None:
        """Server-side, as one manager: fields that are no longer given go. A namespace that is not
        there yet comes with what is in it."""
        namespace = _namespace(Ident.of(obj))
        if namespace is not None and namespace not in self._namespaces:
            self._namespaces.add(namespace)
            with contextlib.suppress(ApiException):
                body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
                self._resource("Namespace").create(body=body)
        self._resource(obj["kind"]).server_side_apply(
            body=obj,
            name=obj["metadata"]["name"],
            namespace=namespace,
            field_manager="acceptance",
            force_conflicts=True,
        )

    def delete(self, ident: Ident) -> None:
        with contextlib.suppress(ApiException):
            self._resource(ident.kind).delete(name=ident.name, namespace=_namespace(ident))

    def read(self, kind: str, namespace: str, name: str) -> list[Json]:
        resource = self._resource(kind)
        query: Json = {}
        if name:
            query["field_selector"] = f"metadata.name={name}"
        if namespace and kind not in _CLUSTER_SCOPED:
            query["namespace"] = namespace
        return [item.to_dict() for item in resource.get(**query).items]


def _namespace(ident: Ident) -> str | None:
    return None if ident.kind in _CLUSTER_SCOPED else ident.namespace or "default"


class ClusterManifests(Manifests):
    """What the cases write, on the API server."""

    def __init__(self, api: Api) -> None:
        super().__init__(Path())
        self._api = api
        self._there: dict[str, dict[Ident, Json]] = {}

    def remove(self, file: str) -> list[Ident]:
        removed = self._files.pop(file)
        self._files[file] = {}
        self._write(file)
        del self._files[file]
        return list(removed)

    def _write(self, file: str) -> None:
        before, now = self._there.get(file, {}), self._files[file]
        for ident, obj in now.items():
            if before.get(ident) != obj:
                self._api.apply(obj)
        for ident in [ident for ident in reversed(before) if ident not in now]:
            self._api.delete(ident)
        self._there[file] = dict(now)


class ClusterAgent(Agent):
    """An agent of a cluster: objects have the status that the API server has, and count once the
    agent has seen them."""

    def __init__(self, run_dir: Path, api: Api) -> None:
        super().__init__(run_dir)
        self._api = api

    def objects(self, kind: str, namespace: str = "", name: str = "") -> list[Json]:
        return _written(super().objects(kind, namespace, name), self._api, kind, namespace, name)


def _written(seen: list[Json], api: Api, kind: str, namespace: str, name: str) -> list[Json]:
    def key(obj: Json) -> tuple[str, str]:
        return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]

    written = {key(obj): obj for obj in api.read(kind, namespace, name)}
    return [written.get(key(obj), obj) for obj in seen]


class ClusterGateway(GatewayProcess):
    """`weft up` on a cluster, and the controller beside it."""

    def __init__(self, api: Api, kubeconfig: Path, run_dir: Path, pool: str, *options: str) -> None:
        both = (f"--kubeconfig={kubeconfig}", f"--secrets-namespace={_SECRETS}", pool)
        super().__init__(None, run_dir, *both, *options)
        self._api = api
        weft = str(Path(sys.executable).with_name("weft"))
        self._controller_command = [weft, "controller", *both]
        self._controller: asyncio.subprocess.Process | None = None

    @property
    def controller_pid(self) -> int:
        assert self._controller is not None
        return self._controller.pid

    def objects(self, kind: str, namespace: str = "", name: str = "") -> list[Json]:
        return _written(super().objects(kind, namespace, name), self._api, kind, namespace, name)

    async def start(self, within_s: float = 20.0) -> None:
        self._api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _SECRETS}})
        await super().start(within_s)
        with self.log_file.with_name("controller.log").open("wb") as log:
            self._controller = await asyncio.create_subprocess_exec(
                *self._controller_command, stdout=log, stderr=asyncio.subprocess.STDOUT
            )

    async def stop(self) -> int:
        if self._controller is not None and self._controller.returncode is None:
            self._controller.terminate()
            await self._controller.wait()
        return await super().stop()
