"""A lab whose objects are on an API server: what connects it with that.

    python -m mesh.lab.cluster RUN_DIR LAB

Writes what the lab knows (nodes, namespaces, Services, pods and how they are, endpoints, the
manifests of lab.yaml) to the server, and keeps it so; has pods that others create there run on its
nodes (`kubelet`); lets the nodes, which have no way out of their namespaces, reach the server at a
port of their own loopback; runs `weft controller`. Objects that others write there, with kubectl
say, are theirs. What the lab wrote stays when it goes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from l7proxy.tasks import spawn
from mesh.lab.kernel import inside
from mesh.lab.kubelet import Kubelet, own_pods
from mesh.lab.plan import Plan
from mesh.lab.state import LabDir
from mesh.model.core import Secret
from mesh.model.decode import KINDS, Object, encode
from mesh.model.meta import ObjectKey
from mesh.sources.directory import DirectorySource
from mesh.sources.kubernetes_client import APPLY, Backoff, Client, ServerError, object_path

_log = logging.getLogger("weft.lab")

NAMESPACE = "weft-system"
_MANAGER = "weft-lab"
# Where nodes find the server, on their loopback.
_PORT = 16443
_CHUNK = 65536
# The server's own.
_SERVERS = ("resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
# Whose statuses are the lab's to write, as kubelet's.
_WITH_STATUS = ("Node", "Pod")
# Namespaces before what is in them.
_ORDER = ("Namespace", "Node", "GatewayClass")


def node_kubeconfig(given: Path) -> dict[str, Any]:
    """The kubeconfig for nodes: the server at their loopback, by its own name in TLS."""
    config: dict[str, Any] = yaml.safe_load(given.read_text())
    for entry in config["clusters"]:
        cluster = entry["cluster"]
        parts = urlsplit(cluster["server"])
        cluster["server"] = f"{parts.scheme}://127.0.0.1:{_PORT}"
        if parts.scheme == "https":
            cluster.setdefault("tls-server-name", parts.hostname)
        _absolute(cluster, "certificate-authority", given.parent)
    for entry in config["users"]:
        for name in ("client-certificate", "client-key", "tokenFile"):
            _absolute(entry["user"] or {}, name, given.parent)
    return config


def _absolute(values: dict[str, Any], name: str, base: Path) -> None:
    if name in values:
        values[name] = str(base / values[name])


class Forward:
    """Connections from nodes to the server, byte by byte."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)

    async def serve(self, plan: Plan) -> None:
        """In each node's namespace, until cancelled."""
        listeners = []
        for node in plan.nodes:
            with inside(node.netns):
                listeners.append(socket.create_server(("127.0.0.1", _PORT)))
        servers = [await asyncio.start_server(self._accept, sock=one) for one in listeners]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_reader, to_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()


class Mirror:
    """The objects of a directory, on the server. Of pods that are not `own` only how they are."""

    def __init__(self, client: Client, own: frozenset[ObjectKey]) -> None:
        self._client = client
        self._own = own

    async def run(self, manifests: Path) -> None:
        """Until cancelled. What cannot be written now is tried again."""
        await self._retried(_plain_namespace(NAMESPACE), "Namespace", ObjectKey("", NAMESPACE))
        async with contextlib.aclosing(DirectorySource(manifests).updates()) as updates:
            async for update in updates:
                kinds = sorted(update.changes, key=lambda kind: (kind not in _ORDER, kind))
                for kind in kinds:
                    for key, obj in update.changes[kind].items():
                        if obj is None and kind == "Pod" and key not in self._own:
                            continue
                        await self._retried(_plain(obj) if obj is not None else None, kind, key)

    async def _retried(self, raw: dict[str, Any] | None, kind: str, key: ObjectKey) -> None:
        backoff = Backoff()
        while True:
            try:
                return await (self._apply(raw) if raw is not None else self._delete(kind, key))
            except ServerError as error:
                if error.status in (400, 403, 404, 409, 422):
                    _log.error("%s %s cannot be written: %s", kind, key, error)
                    return None
                _log.warning("%s %s: %s; trying again", kind, key, error)
                await backoff.wait(error.retry_after_s)

    async def _apply(self, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        path = object_path(raw["apiVersion"], _plural(raw), metadata)
        query = {"fieldManager": _MANAGER, "force": "true"}
        status = raw.pop("status", None)
        about = {"name": metadata["name"], "namespace": metadata.get("namespace", "")}
        if raw["kind"] == "Pod" and ObjectKey(about["namespace"], about["name"]) not in self._own:
            about["uid"] = metadata.get("uid", "")
        else:
            metadata.pop("uid", None)
            await self._client.request("PATCH", path, query, raw, content_type=APPLY)
        if status is not None and raw["kind"] in _WITH_STATUS:
            body = {"apiVersion": raw["apiVersion"], "kind": raw["kind"], "metadata": about}
            body["status"] = status
            await self._client.request("PATCH", f"{path}/status", query, body, content_type=APPLY)

    async def _delete(self, kind: str, key: ObjectKey) -> None:
        (group, info) = next((g, one) for (g, k), one in KINDS.items() if k == kind)
        version = f"{group}/{info.versions[0]}" if group else info.versions[0]
        metadata = {"name": key.name, "namespace": key.namespace}
        with contextlib.suppress(ServerError):
            await self._client.request("DELETE", object_path(version, info.plural, metadata))


def _plain(obj: Object) -> dict[str, Any]:
    """An object as it is applied."""
    raw = encode(obj)
    if isinstance(obj, Secret):
        raw["data"] = {k: base64.b64encode(v).decode() for k, v in obj.data.items()}
    raw["metadata"] = {k: v for k, v in raw["metadata"].items() if k not in _SERVERS}
    return raw


def _plain_namespace(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _plural(raw: dict[str, Any]) -> str:
    group = raw["apiVersion"].rpartition("/")[0]
    return KINDS[group, raw["kind"]].plural


async def run(lab: LabDir, plan: Plan) -> None:
    """Until the process is killed."""
    client = Client(Path(plan.kubeconfig))
    await client.open()
    spawn(Forward(client.url).serve(plan), name="forward")
    mirror = spawn(Mirror(client, own_pods(plan)).run(lab.manifests), name="mirror")
    spawn(Kubelet(client, lab, plan).run(), name="kubelet")
    program = "from mesh.cli.main import main; main()"
    await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", program, "controller", f"--kubeconfig={plan.kubeconfig}"),
        # As the nodes' Weft.
        *("--bind-address=::", "--mesh"),
    )
    await mirror


def main() -> None:
    run_dir, name = sys.argv[1:]
    lab = LabDir(Path(run_dir), name)
    plan = lab.plan()
    if plan is None:
        sys.exit(f"no lab {name} in {run_dir}")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="cluster: %(message)s")
    os.umask(0o077)
    lab.kubeconfig.write_text(yaml.safe_dump(node_kubeconfig(Path(plan.kubeconfig))))
    asyncio.run(run(lab, plan))


if __name__ == "__main__":
    main()
