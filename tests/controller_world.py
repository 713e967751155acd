"""Controllers at an API server, in this process, and what they hear of nodes."""

import asyncio
import contextlib

from apiserver.server import ApiServer
from kube_world import CONTROLLER, CRDS, GROUP, WAIT_S, quick

from mesh.controller.controller import Controller, ControllerOptions
from mesh.model.decode import KINDS
from mesh.model.nodereport import ANNOTATION, LABELS, NodeReport, encode_report

NAMESPACE = "weft-system"


class World:
    def __init__(self, server, tmp_path):
        self.server = server
        self.kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
        self.tasks = []

    def start(self, identity="one", **options):
        about = ControllerOptions(self.kubeconfig, NAMESPACE, identity, **options)
        controller = Controller(about, backoff=quick)
        task = asyncio.get_running_loop().create_task(controller.run())
        self.tasks.append(task)
        return controller, task

    def report(self, node="a", *, owner=None, lasts=40, **report):
        """What an agent would: in force is everything that there is, or what is said. `owner`: the
        Node that its Lease goes with."""
        everything = {kind: 10**9 for _, kind in KINDS}
        report = {"ready": True, "versions": everything, "mesh": True, **report}
        report = {"addresses": ("192.0.2.1",), **report}
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": f"weft-node.{node}",
                "namespace": NAMESPACE,
                "labels": LABELS,
                "annotations": {ANNOTATION: encode_report(NodeReport(node, **report))},
            },
            "spec": {"holderIdentity": node, "leaseDurationSeconds": lasts},
        }
        if owner is not None:
            about = {"name": node, "uid": owner["metadata"]["uid"]}
            lease["metadata"]["ownerReferences"] = [{"apiVersion": "v1", "kind": "Node", **about}]
        if self.server.get("coordination.k8s.io/leases", f"weft-node.{node}", NAMESPACE):
            self.server.change(lease, lease)
        else:
            self.server.create(lease)

    def status(self, plural, name, namespace="default"):
        obj = self.server.get(f"{GROUP}/{plural}", name, namespace)
        return (obj or {}).get("status", {})

    def events(self, name):
        """The Events about objects of a name, by type and reason."""
        store = self.server.store
        return {
            (one["type"], one["reason"]): one
            for _, one in store.list("/events", None, store.revision)
            if one["involvedObject"]["name"] == name
        }

    def conditions(self, plural="gateways", name="gw", namespace="default"):
        status = self.status(plural, name, namespace)
        if "parents" in status:
            status = next(p for p in status["parents"] if p["controllerName"] == CONTROLLER)
        return {one["type"]: one["status"] for one in status.get("conditions", ())}

    async def until(self, holds):
        """Looked at whenever something is written."""
        queues = [self.server.store.watch(one.id) for one in self.server.registry.all()]
        async with asyncio.timeout(WAIT_S):
            while not (found := _try(holds)):
                waits = [asyncio.ensure_future(queue.get()) for queue in queues]
                _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for one in pending:
                    one.cancel()
        return found


def _try(holds):
    with contextlib.suppress(StopIteration, KeyError, IndexError, TypeError):
        return holds()
    return None


@contextlib.asynccontextmanager
async def controller_world(tmp_path):
    """An API server that has Gateway API; controllers that were started are ended."""
    async with ApiServer(bookmark_s=0.05) as server:
        server.install_crds(CRDS)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        server.create(namespace)
        found = World(server, tmp_path)
        yield found
        for task in found.tasks:
            task.cancel()
        await asyncio.gather(*found.tasks, return_exceptions=True)
