"""`weft check`: whether Weft can work here: this host's kernel, the cluster, and permissions.

Each check says what it found, and where that is not well, what to do.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import AsyncIterator, Collection, Iterable
from pathlib import Path
from typing import Any

from bpf import selftest
from bpf.programs import OLDEST_KERNEL
from mesh.install import manifests, rights
from mesh.install.cluster import CRDS
from mesh.install.finding import Finding
from mesh.model.decode import KINDS
from mesh.model.references import GROUP
from mesh.sources.kubernetes_client import Client, ServerError

_OLDEST_SERVER = (1, 30)
# Gateway API versions (the bundle's) that are known to work.
_OLDEST_BUNDLE, _NEWEST_BUNDLE = (1, 4), (1, 6)


# --- this host -----------------------------------------------------------------------------------


def host() -> Iterable[Finding]:
    """What the mesh needs of a node; a gateway alone needs none of it."""
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    new = numbers >= OLDEST_KERNEL
    wanted = ".".join(map(str, OLDEST_KERNEL))
    yield Finding(
        "kernel",
        "ok" if new else "warning",
        release,
        "" if new else f"the mesh needs Linux {wanted} or newer; gateways work without",
    )
    for what, path, todo in (
        ("BTF", Path("/sys/kernel/btf/vmlinux"), "use a kernel with CONFIG_DEBUG_INFO_BTF=y"),
        ("cgroup v2", _mounted("cgroup2"), "mount it: mount -t cgroup2 none DIRECTORY"),
    ):
        if path is not None and path.exists():
            yield Finding(what, "ok", str(path))
        else:
            yield Finding(what, "warning", "absent", f"{todo}; gateways work without")
    root = os.geteuid() == 0
    yield Finding(
        "user",
        "ok" if root else "warning",
        "root" if root else f"uid {os.geteuid()}",
        "" if root else "the eBPF self-test and ports below 1024 need root",
    )


def _mounted(kind: str) -> Path | None:
    """Where a file system of this type is mounted."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return next((Path(fields[1]) for fields in mounts if fields[2] == kind), None)


def kernel(directory: Path) -> Iterable[Finding]:
    """The self-test of the eBPF data path, in a directory and a cgroup of its own."""
    parent = _mounted("cgroup2")
    if parent is None or os.geteuid() != 0:
        yield Finding("eBPF", "warning", "not tested", "it takes root and cgroup v2")
        return
    for check in selftest.run(directory, parent, f"weft-check-{os.getpid()}"):
        fact = selftest.FACTS[check.name]
        yield Finding(
            f"eBPF {check.name}",
            "ok" if check.ok else "warning",
            fact if check.ok else check.why,
            "" if check.ok else f"not on this kernel: {fact}; gateways work without",
        )


# --- the cluster ---------------------------------------------------------------------------------


async def cluster(client: Client, namespace: str) -> AsyncIterator[Finding]:
    """Whether there is a cluster that Weft can be installed in, or is."""
    try:
        version = await client.request("GET", "/version")
    except ServerError as error:
        yield Finding("API server", "failed", str(error), "look at the kubeconfig: kubectl version")
        return
    number = tuple(int("".join(filter(str.isdigit, version[key])) or 0) for key in _NUMBER)
    wanted = ".".join(map(str, _OLDEST_SERVER))
    yield Finding(
        "API server",
        "ok" if number >= _OLDEST_SERVER else "warning",
        f"{client.url}, {version['gitVersion']}",
        "" if number >= _OLDEST_SERVER else f"Weft is tested with {wanted} and newer",
    )
    async for finding in _gateway_api(client):
        yield finding
    installed, agents = await _nodes(client, namespace)
    options = await _options(client, namespace) if installed else {}
    objects = manifests.objects(namespace=namespace, **options)
    given = rights.of_accounts(objects)
    # Who gives rights must have them ("Privilege escalation prevention").
    needed = {*rights.to_apply(objects), *itertools.chain(*given.values())}
    todo = "weft install needs a user who may; an administrator of the cluster"
    yield await _rights(client, "this user", sorted(needed), todo)
    for account, of_account in given.items() if installed else ():
        todo = "roles of another version, or not there: weft install, as such a user"
        yield await _rights(client, account.partition(":")[2], of_account, todo, account)
    yield agents


_NUMBER = ("major", "minor")


async def _gateway_api(client: Client) -> AsyncIterator[Finding]:
    for (group, kind), info in KINDS.items():
        if group != GROUP:
            continue
        name = f"{info.plural}.{group}"
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
        try:
            crd = await client.request("GET", path)
        except ServerError as error:
            absent = error.status == 404
            yield Finding(
                kind,
                "failed" if kind in _NEEDED else "warning",
                "not in the cluster" if absent else str(error),
                f"get it: {CRDS}" if absent else "let this user get CustomResourceDefinitions",
            )
            continue
        yield _bundle(kind, crd, info.versions)


_NEEDED = ("GatewayClass", "Gateway", "HTTPRoute", "ReferenceGrant")


def _bundle(kind: str, crd: dict[str, Any], versions: tuple[str, ...]) -> Finding:
    annotations = crd["metadata"].get("annotations") or {}
    bundle = annotations.get(f"{GROUP}/bundle-version", "of unknown version")
    channel = annotations.get(f"{GROUP}/channel", "unknown")
    served = [one["name"] for one in crd["spec"]["versions"] if one["served"]]
    found = f"Gateway API {bundle}, {channel} channel, serves {', '.join(served)}"
    if not set(served) & set(versions):
        return Finding(kind, "failed", found, f"Weft reads {', '.join(versions)}: {CRDS}")
    number = tuple(int(part) for part in bundle.lstrip("v").split(".")[:2] if part.isdigit())
    if not _OLDEST_BUNDLE <= number <= _NEWEST_BUNDLE:
        return Finding(kind, "warning", found, "Weft knows v1.4 to v1.6")
    return Finding(kind, "ok", found)


async def _rights(
    client: Client, who: str, needed: Collection[rights.Right], todo: str, account: str = ""
) -> Finding:
    what = f"rights of {who}"
    try:
        lacking = await rights.missing(client, needed, account)
    except ServerError as error:
        return Finding(what, "warning", str(error), "let this user create access reviews")
    if not lacking:
        return Finding(what, "ok", f"all {len(needed)} that the roles name")
    return Finding(what, "failed", f"may not {'; '.join(map(str, lacking))}", todo)


async def _nodes(client: Client, namespace: str) -> tuple[bool, Finding]:
    """Whether Weft is installed, and how its agents are."""
    path = f"/apis/apps/v1/namespaces/{namespace}/daemonsets/weft-agent"
    try:
        status = (await client.request("GET", path)).get("status") or {}
    except ServerError as error:
        if error.status == 404:
            return False, Finding("agents", "ok", "not installed: weft install")
        return False, Finding("agents", "warning", str(error), "let this user get DaemonSets")
    wanted, ready = status.get("desiredNumberScheduled", 0), status.get("numberReady", 0)
    if ready < wanted:
        todo = f"kubectl -n {namespace} get pods; kubectl -n {namespace} logs daemonset/weft-agent"
        return True, Finding("agents", "failed", f"{ready} of {wanted} nodes are ready", todo)
    return True, Finding("agents", "ok", f"{ready} of {wanted} nodes are ready")


async def _options(client: Client, namespace: str) -> dict[str, bool]:
    """With what it was installed, as far as rights differ; {}: that cannot be seen."""
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/weft-controller"
    try:
        found = await client.request("GET", path)
    except ServerError:
        return {}
    containers = found["spec"]["template"]["spec"]["containers"]
    args = [arg for one in containers for arg in one.get("args") or ()]
    return {"steer": "--mesh" in args, "load_balancer": "--load-balancer" in args}
