"""A lab whose objects are on an API server. Needs root."""

import asyncio
import subprocess

from apiserver.server import ApiServer
from controller_world import World
from kube_world import CRDS, GROUP, KUBECTL, needs_crds, needs_kubectl
from lab_world import lab_of, needs_root

from tests.test_lab_gateway import _ASK, _GATEWAY, _ROUTE, CONFIG

pytestmark = [
    needs_root,
    needs_crds,
    needs_kubectl,
]


async def test_routes_applied_with_kubectl_take_effect_and_statuses_come_back(tmp_path):
    async with ApiServer(tls=True, bookmark_s=0.5) as server:
        server.install_crds(CRDS)
        world = World(server, tmp_path)
        (tmp_path / "gateway.yaml").write_text(_GATEWAY)
        (tmp_path / "routes").mkdir()
        with lab_of(tmp_path, "cluster", CONFIG) as lab:
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
            stopped = await asyncio.to_thread(lab.weft, "stop", "web")
            assert stopped.returncode == 0, stopped.stderr
            await world.until(lambda: server.get("/pods", "web") is None)
            assert server.get(f"{GROUP}/httproutes", "r")


async def _apply(world, manifest):
    process = await asyncio.create_subprocess_exec(
        *(KUBECTL, f"--kubeconfig={world.kubeconfig}", "apply", "-f", "-"),
        f"--cache-dir={world.kubeconfig.parent}/cache",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    await process.communicate(manifest.encode())
    assert process.returncode == 0
