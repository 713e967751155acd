"""Agent and controller as deploy/ starts them, on a node of a test's making: exactly the arguments,
mounts, users and capabilities of the manifests; let in by the tokens of their pods, with the rights
of their roles; in a network of their own."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from mesh.install import manifests
from mesh.lab.kernel import CLONE_NEWNET, join, unshare
from tests.support.running import PROJECT
from tests.test_agent_end_to_end import WAIT_S

NAMESPACE = manifests.NAMESPACE
NODE_IP = "10.8.0.1"


@contextlib.contextmanager
def network(*addresses):
    """Of its own, with these addresses."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    unshare(CLONE_NEWNET)
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for address in addresses:
            subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        yield
    finally:
        join(Path(f"/proc/thread-self/fd/{home}"), CLONE_NEWNET)
        os.close(home)


def pod_of(kind, *, steer=True):
    (found,) = [one for one in manifests.objects(steer=steer) if one["kind"] == kind]
    return found["spec"]["template"]["spec"]


# What a kubelet mounts. $1: the service account's files, $2: a copy of /etc. The checkout stays
# where it is, also where one of the directories is mounted above it.
_MOUNTS = """
set -e
if [ -n "$CGROUP" ]; then echo $$ >"$CGROUP/cgroup.procs"; fi
mount --make-rslave /
mount -t tmpfs none /run
mkdir -p /run/secrets/kubernetes.io
cp -a "$1" /run/secrets/kubernetes.io/serviceaccount
mount --bind "$2" /etc
shift 2
mkdir /run/checkout
mount --bind "$CHECKOUT" /run/checkout
for pair in $OF_NODE; do mkdir -p ${pair#*:}; mount --rbind ${pair%:*} ${pair#*:}; done
for directory in $EMPTY; do mkdir -p "$directory"; mount -t tmpfs none "$directory"; done
mkdir -p "$CHECKOUT"
mount --bind /run/checkout "$CHECKOUT"
exec unshare --cgroup "$@"
"""


class Deployed:
    """A pod of the manifests, on node a, whose root is `node`, in a cgroup if there is one. `said`:
    what its container has said."""

    def __init__(self, pod, server, directory, node, cgroup=None):
        self.said = directory / "said"
        (container,) = pod["containers"]
        given = {"NODE_NAME": "a", "POD_NAMESPACE": NAMESPACE, "HOST_IPS": NODE_IP}
        assert {one["name"] for one in container["env"]} <= given.keys()
        args = [re.sub(r"\$\((\w+)\)", lambda m: given[m[1]], one) for one in container["args"]]
        account = pod["serviceAccountName"]
        command = ["unshare", "--mount", "sh", "-c", _MOUNTS, "sh"]
        command += [self._token(account, server, directory), self._etc(pod, directory)]
        command += [*_as_user(pod, container), str(Path(sys.executable).with_name("weft")), *args]
        mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        empty = [mounted[one["name"]] for one in pod["volumes"] if "emptyDir" in one]
        of_node = []
        for volume in pod["volumes"]:
            if "hostPath" in volume:
                source = Path(f"{node}{volume['hostPath']['path']}")
                if volume["hostPath"]["type"] == "DirectoryOrCreate":
                    source.mkdir(parents=True, exist_ok=True)
                of_node.append(f"{source}:{mounted[volume['name']]}")
        host, port = "127.0.0.1", str(server.port)
        env = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        env |= {"CHECKOUT": str(PROJECT), "EMPTY": " ".join(empty), "OF_NODE": " ".join(of_node)}
        env |= {"CGROUP": str(cgroup or "")}
        # What is compiled is kept where the other tests keep it.
        env |= {name: os.environ[name] for name in ("WEFT_CACHE",) if name in os.environ}
        env |= {"PATH": os.environ["PATH"], "HOME": "/"}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(command, env=env, stderr=said, stdout=said, cwd=PROJECT)

    def _token(self, account, server, directory):
        name = f"{account}-{directory.name.lower()}"
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"nodeName": "a", "serviceAccountName": account},
        }
        uid = server.create(pod)["metadata"]["uid"]
        about = "authentication.kubernetes.io/pod"
        extra = {f"{about}-name": [name], f"{about}-uid": [uid]}
        server.auth.service_account(account, NAMESPACE, account, extra=extra)
        files = directory / "account"
        files.mkdir()
        (files / "token").write_text(account)
        (files / "ca.crt").write_bytes(server._authority.cert_pem.bytes())
        return files

    def _etc(self, pod, directory):
        copy = directory / "etc"
        subprocess.run(["cp", "-a", "/etc", copy], check=True)
        for volume in pod["volumes"]:
            if "configMap" in volume:
                (files,) = [
                    one["data"] for one in manifests.objects() if one["kind"] == "ConfigMap"
                ]
                (copy / "weft").mkdir()
                for name, text in files.items():
                    (copy / "weft" / name).write_text(text)
        return copy

    async def ready(self, probe):
        """Until a kubelet would say so."""
        port = probe["httpGet"]["port"]
        async with asyncio.timeout(WAIT_S):
            while await get(port, probe["httpGet"]["path"]) != 200:
                assert self.process.poll() is None, self.said.read_text()
                await asyncio.sleep(0.05)

    def end(self):
        """By more than one signal, so that nothing is waited for."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.3)


async def get(port, path):
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return None
    with contextlib.closing(writer):
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return int((await reader.readline()).split()[1])


def _as_user(pod, container):
    of_container, of_pod = container["securityContext"], pod.get("securityContext", {})
    kept = [f"+{one.lower()}" for one in of_container["capabilities"].get("add", ())]
    capabilities = ",".join(("-all", *kept))
    user = of_container.get("runAsUser", of_pod.get("runAsUser"))
    result = ["setpriv", f"--bounding-set={capabilities}", "--no-new-privs"]
    result += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return result
