"""`weft install` and `uninstall`: the manifests into a cluster, and out of it.

Applied server-side under a field manager of its own, so that installing again is an upgrade.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from mesh.model.meta import MANAGED_BY, MANAGED_LABEL, SLICE_MANAGED_LABEL
from mesh.model.nodereport import BUNDLE_NAME, SIGNER
from mesh.sources.kubernetes_client import APPLY, Client, ServerError, object_path

_MANAGER = "weft-install"
_PLURALS = {"GatewayClass": "gatewayclasses"}
_POLL_S = 0.5
# What controllers make outside of Weft's namespaces: the trust bundle, and Gateways' balancers.
_PUBLISHED = (
    ("/api/v1/configmaps", {"fieldSelector": f"metadata.name={BUNDLE_NAME}"}),
    *(
        (
            f"/apis/certificates.k8s.io/{version}/clustertrustbundles",
            {"fieldSelector": f"spec.signerName={SIGNER}"},
        )
        for version in ("v1", "v1beta1", "v1alpha1")
    ),
    ("/api/v1/services", {"labelSelector": f"{MANAGED_LABEL}={MANAGED_BY}"}),
    (
        "/apis/discovery.k8s.io/v1/endpointslices",
        {"labelSelector": f"{SLICE_MANAGED_LABEL}={MANAGED_BY}"},
    ),
)


class InstallError(Exception):
    """It cannot be installed; what is in the way and what to do."""


def path_of(obj: dict[str, Any]) -> str:
    """Where an object is on the server."""
    plural = _PLURALS.get(obj["kind"], f"{obj['kind'].lower()}s")
    return object_path(obj["apiVersion"], plural, obj["metadata"])


async def install(
    client: Client, objects: Iterable[dict[str, Any]], say: Callable[[str], None]
) -> None:
    """InstallError, ServerError: it was not finished; what was done stays, and can be repeated."""
    for obj in objects:
        name = f"{obj['kind']} {obj['metadata']['name']}"
        query = {"fieldManager": _MANAGER, "force": "true"}
        try:
            await client.request("PATCH", path_of(obj), query, obj, content_type=APPLY)
        except ServerError as error:
            if error.status == 404 and obj["kind"] == "GatewayClass":
                raise InstallError(
                    f"{name}: the cluster has no Gateway API: install its CustomResourceDefinitions"
                    f" ({CRDS}), then run weft install again"
                ) from None
            raise
        say(f"{name}: applied")


async def uninstall(
    client: Client, objects: Iterable[dict[str, Any]], say: Callable[[str], None], wait_s: float
) -> None:
    """Everything that `install` made: the controllers and the agents, what the former published
    (the trust bundle; Gateways' Services, with the addresses that clients know), then the rest,
    last first, and wait for the namespace to be gone. Statuses that the controller wrote stay as
    they are: it ends before its GatewayClass goes. Agents take the CNI plugin off their nodes, by
    what they may learn of the cluster until then. InstallError: something is not gone in time."""
    newest_first = list(reversed(list(objects)))
    first = [obj for obj in newest_first if obj["kind"] in ("Deployment", "DaemonSet")]
    for obj in first:
        # Gone once its pods are ("Foreground cascading deletion").
        if await _delete(client, obj, "Foreground", say):
            await _gone(client, path_of(obj), wait_s)
    for path, selector in _PUBLISHED:
        await _delete_published(client, path, selector, say)
    last = ""
    for obj in newest_first:
        if obj not in first and await _delete(client, obj, "Background", say):
            last = path_of(obj)
    if last:
        await _gone(client, last, wait_s)


async def _delete_published(
    client: Client, path: str, selector: dict[str, str], say: Callable[[str], None]
) -> None:
    try:
        found = await client.request("GET", path, selector)
        kind, version = found["kind"].removesuffix("List"), found["apiVersion"]
        for one in found["items"]:
            obj = {"apiVersion": version, "kind": kind, "metadata": one["metadata"]}
            await _delete(client, obj, "Background", say)
    except ServerError as error:
        if error.status == 403:
            about = ", ".join(selector.values())
            say(f"{path} ({about}): left, this user may not delete them: {error}")
        elif error.status != 404:
            raise


async def _delete(
    client: Client, obj: dict[str, Any], how: str, say: Callable[[str], None]
) -> bool:
    """Whether it was there."""
    try:
        await client.request("DELETE", path_of(obj), {"propagationPolicy": how})
    except ServerError as error:
        if error.status != 404:
            raise
        return False
    say(f"{obj['kind']} {obj['metadata']['name']}: deleted")
    return True


async def _gone(client: Client, path: str, wait_s: float) -> None:
    try:
        async with asyncio.timeout(wait_s):
            while True:
                if not await _there(client, path):
                    return
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise InstallError(
            f"{path} is still there after {wait_s:g} s: see what holds it with kubectl get --raw"
            f" {path}; pods of nodes that are down: kubectl delete pod --force"
        ) from None


async def _there(client: Client, path: str) -> bool:
    try:
        await client.request("GET", path)
    except ServerError as error:
        if error.status == 404:
            return False
        raise
    return True


CRDS = (
    "kubectl apply --server-side -f https://github.com/kubernetes-sigs/gateway-api/releases/"
    "download/v1.6.1/standard-install.yaml, or experimental-install.yaml for all fields"
)
