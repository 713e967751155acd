"""A lab whose objects are on an API server. Needs root."""

import asyncio
import subprocess

import yaml
from apiserver.server import ApiServer
from controller_world import World
from kube_world import (
    CILIUM,
    CRDS,
    GROUP,
    KUBECTL,
    WAIT_S,
    cilium_crds,
    needs_cilium_crds,
    needs_crds,
    needs_kubectl,
    policy,
)
from lab_world import lab_of, needs_root

from tests.test_lab_gateway import _ASK, _GATEWAY, _ROUTE, CONFIG

pytestmark = [
    needs_root,
    needs_crds,
    needs_cilium_crds,
    needs_kubectl,
]


async def test_routes_applied_with_kubectl_take_effect_and_statuses_come_back(tmp_path):
    async with ApiServer(tls=True, bookmark_s=0.5) as server:
        server.install_crds(CRDS)
        for crd in cilium_crds(conditions=True):
            server.create(crd)
        world = World(server, tmp_path)
        (tmp_path / "gateway.yaml").write_text(_GATEWAY)
        (tmp_path / "routes").mkdir()
        config = CONFIG.replace(
            "services:", "services:\n  - {name: late, ports: [{port: 80, targetPort: 8080}]}"
        )
        with lab_of(tmp_path, "cluster", config) as lab:
            option = f"--kubeconfig={world.kubeconfig}"
            done = await asyncio.to_thread(lab.up, option, "--wait=55")
            assert done.returncode == 0, done.stderr
            await world.until(lambda: world.conditions("gateways", "front")["Programmed"] == "True")
            (address,) = [
                one["value"]
                for one in world.status("gateways", "front")["addresses"]
                if one["value"].startswith("172.")
            ][:1]
            for name, path, service in (("r", "/", "web"), ("api", "/api", "api")):
                await _apply(world, _ROUTE % (name, path, service))
                await world.until(
                    lambda name=name: world.conditions("httproutes", name)["Accepted"] == "True"
                )
            ask = asyncio.to_thread(lab.python, "outside/client", _ASK, f"http://{address}/api")
            assert '"pod": "api"' in await ask
            # How a pod is, is on the server too.
            pod = server.get("/pods", "web")
            assert pod["status"]["phase"] == "Running"
            await _policies(world, lab, address)
            await _pods_that_are_created(world, lab, address)
            stopped = await asyncio.to_thread(lab.weft, "stop", "web")
            assert stopped.returncode == 0, stopped.stderr
            await world.until(lambda: server.get("/pods", "web") is None)
            assert server.get(f"{GROUP}/httproutes", "r")
            await asyncio.to_thread(lab.weft, "down")


_IN_FORCE = {"Accepted": "True", "Programmed": "True"}


async def _policies(world, lab, address):
    """Of each kind: it is in force, then it is not."""
    for kind, plural in (
        ("NetworkPolicy", ""),
        ("CiliumNetworkPolicy", "ciliumnetworkpolicies"),
        ("CiliumClusterwideNetworkPolicy", "ciliumclusterwidenetworkpolicies"),
    ):
        obj = policy(kind, "deny")
        if plural:
            # A rule that names nobody.
            obj["spec"] = {"endpointSelector": {"matchLabels": {"app": "api"}}, "ingress": [{}]}
        else:
            obj["spec"] = {"podSelector": {"matchLabels": {"app": "api"}}}
        await _apply(world, yaml.safe_dump(obj))
        await _asked(lab, f"http://{address}/api", "403")
        if plural:
            namespace = obj["metadata"].get("namespace", "")

            def conditions(plural=plural, namespace=namespace):
                found = world.server.get(f"{CILIUM}/{plural}", "deny", namespace)
                return {one["type"]: one["status"] for one in found["status"]["conditions"]}

            await world.until(lambda: conditions() == _IN_FORCE)
        world.server.delete(obj)
        await _asked(lab, f"http://{address}/api", '200 {"pod": "api"')


async def _asked(lab, url, wanted):
    """Until a client outside is answered so."""
    async with asyncio.timeout(WAIT_S):
        while not (await asyncio.to_thread(lab.python, "outside/client", _ASK, url)).startswith(
            wanted
        ):
            await asyncio.sleep(0.05)


async def _pods_that_are_created(world, lab, address):
    """With kubectl: they run on a node, with addresses and readiness, and end when deleted."""
    (program,) = [
        line.partition("[")[2].partition("]")[0].split(", ")[1]
        for line in CONFIG.splitlines()
        if "command" in line
    ][:1]
    await _apply(world, _ROUTE % ("late", "/late", "late"))

    def pod():
        status = (world.server.get("/pods", "late") or {}).get("status", {})
        ready = [one["status"] for one in status.get("conditions", ()) if one["type"] == "Ready"]
        return status.get("podIPs"), ready == ["True"]

    for node in ("b", ""):
        await _apply(
            world, _POD % {"node": f"nodeName: {node}" if node else "", "program": program}
        )
        await world.until(lambda: pod()[1])
        found = world.server.get("/pods", "late")
        assert found["spec"]["nodeName"] in ((node,) if node else ("a", "b"))
        assert len(pod()[0]) == 2
        await _asked(lab, f"http://{address}/late", '200 {"pod": "late"')
        inside = await asyncio.to_thread(lab.run, "late", "printenv", "POD_IP", "GIVEN")
        assert inside.stdout.split() == [pod()[0][0]["ip"], "here"], inside.stderr
        world.server.delete(found)
        await _asked(lab, f"http://{address}/late", "503")
        assert world.server.get("/pods", "late") is None


_POD = """
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: default, labels: {app: late}}
spec:
  %(node)s
  containers:
  - name: server
    image: none
    command: [python3]
    args: [%(program)s, "8080"]
    env: [{name: GIVEN, value: here}]
    ports: [{name: http, containerPort: 8080}]
"""


async def _apply(world, manifest):
    process = await asyncio.create_subprocess_exec(
        *(KUBECTL, f"--kubeconfig={world.kubeconfig}", "apply", "-f", "-"),
        f"--cache-dir={world.kubeconfig.parent}/cache",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    await process.communicate(manifest.encode())
    assert process.returncode == 0
