"""Weft into a cluster and out of it: manifests, permissions, and what is checked before."""

import asyncio
import copy
import json
import platform
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from apiserver.server import ApiServer
from click.testing import CliRunner
from controller_world import World
from kube_world import (
    CRDS,
    GROUP,
    KUBECTL,
    cilium_crds,
    gateway,
    gateway_class,
    needs_cilium_crds,
    needs_crds,
    needs_kubectl,
    policy,
    quick,
    tls_secret,
)

from bpf import selftest
from l7proxy.tasks import spawn
from mesh.agent import supervisor
from mesh.agent.daemonset import DaemonSet
from mesh.cli.main import cli
from mesh.controller.controller import Controller, ControllerOptions
from mesh.install import check_node, manifests
from mesh.install.cluster import path_of
from mesh.sources.kubernetes_client import Client, ServerError
from tests.support.running import PROJECT, running

NAMESPACE = manifests.NAMESPACE
CRD = "apiextensions.k8s.io/customresourcedefinitions"


@pytest.fixture
async def server():
    async with ApiServer(bookmark_s=0.1) as found:
        yield found


async def weft(*arguments):
    """Exit code and output of the command, beside a server in this loop."""
    result = await asyncio.to_thread(CliRunner().invoke, cli, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def stored(server):
    return {
        (resource.kind, key.name)
        for resource in server.registry.all()
        for key, _ in server.store.list(resource.id, None, server.store.revision)
    }


@needs_crds
async def test_installed_again_and_removed(server, tmp_path):
    server.install_crds(CRDS)
    server.create(gateway())
    before = stored(server)
    config = f"--kubeconfig={server.kubeconfig(tmp_path / 'kubeconfig')}"
    code, said = await weft("install", config)
    assert code == 0, said
    made = stored(server) - before
    assert made == {(one["kind"], one["metadata"]["name"]) for one in manifests.objects()}
    revision = server.store.revision
    assert (await weft("install", config))[0] == 0
    assert server.store.revision == revision
    assert (await weft("install", config, "--image=weft:next"))[0] == 0
    pod = server.get("apps/daemonsets", "weft-agent", NAMESPACE)["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "weft:next"
    # As a controller publishes it; what else pods have stays.
    bundle = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "weft-trust-bundle"}}
    bundle["metadata"]["namespace"] = "default"
    server.create(bundle)
    about = {"apiVersion": "certificates.k8s.io/v1beta1", "kind": "ClusterTrustBundle"}
    for signer in ("weft.dev/workload", "example.com/other"):
        name = f"{signer.replace('/', ':')}:cluster.local"
        spec = {"signerName": signer, "trustBundle": "x"}
        server.create({**about, "metadata": {"name": name}, "spec": spec})
    before.add(("ClusterTrustBundle", "example.com:other:cluster.local"))
    # And Services of Gateways, of which others are other people's.
    for kind, version, label in (
        ("Service", "v1", "app.kubernetes.io/managed-by"),
        ("EndpointSlice", "discovery.k8s.io/v1", "endpointslice.kubernetes.io/managed-by"),
    ):
        for by in ("weft.dev", "other"):
            metadata = {"name": f"gw-{by}", "namespace": "default", "labels": {label: by}}
            obj = {"apiVersion": version, "kind": kind, "metadata": metadata}
            slices = {"addressType": "IPv4", "endpoints": []}
            server.create({**obj, **(slices if kind == "EndpointSlice" else {"spec": {}})})
        before.add((kind, "gw-other"))
    # While a controller runs its GatewayClass stays: without it, statuses would go.
    deployment = server.get("apps/deployments", "weft-controller", NAMESPACE)
    server.change(deployment, {"metadata": {"finalizers": ["foregroundDeletion"]}})
    deployments = server.store.watch("apps/deployments")
    removing = spawn(weft("uninstall", config), name="uninstall")
    async with asyncio.timeout(20):
        while not (await deployments.get()).new["metadata"].get("deletionTimestamp"):
            pass
        asked = len(server.requests)
        while len(server.requests) < asked + 3:
            await asyncio.sleep(0.01)
    assert server.get(f"{GROUP}/gatewayclasses", "weft", "")
    server.change(deployment, {"metadata": {"finalizers": []}})
    assert (await removing)[0] == 0
    (path,) = [path for method, path in server.requests if method == "DELETE" and "deploy" in path]
    assert path.endswith("/weft-controller?propagationPolicy=Foreground")
    assert stored(server) == before
    assert (await weft("uninstall", config))[0] == 0


async def test_without_gateway_api_it_is_said_how_to_get_it(server, tmp_path):
    config = f"--kubeconfig={server.kubeconfig(tmp_path / 'kubeconfig')}"
    code, said = await weft("install", config)
    assert code == 1
    assert "the cluster has no Gateway API" in said
    code, said = await weft("check", config, "--only=cluster", "-o", "json")
    findings = {one["what"]: one for one in json.loads(said)}
    assert code == 1
    assert findings["Gateway"]["result"] == "failed"
    assert "standard-install.yaml" in findings["Gateway"]["todo"]
    assert findings["GRPCRoute"]["result"] == "warning"
    assert findings["API server"]["result"] == "ok"


@needs_crds
async def test_checks_of_a_cluster_that_is_well(server, tmp_path):
    server.install_crds(CRDS)
    config = f"--kubeconfig={server.kubeconfig(tmp_path / 'kubeconfig')}"
    code, said = await weft("check", config, "--only=cluster", "-o", "json")
    assert code == 0, said
    findings = {one["what"]: one for one in json.loads(said)}
    assert findings["Gateway"]["found"].startswith("Gateway API v1.6.1, experimental channel")
    assert {one["result"] for what, one in findings.items() if what in ("Gateway", "agents")} == {
        "ok"
    }
    assert findings["rights of this user"]["result"] == "ok"
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"gateways.{GROUP}"},
    }

    async def of_gateway(**annotations):
        about = {f"{GROUP}/{name.replace('_', '-')}": one for name, one in annotations.items()}
        server.change(crd, {"metadata": {"annotations": about}})
        _, said = await weft("check", config, "--only=cluster", "-o", "json")
        return next(one for one in json.loads(said) if one["what"] == "Gateway")

    for version, result in (("v1.4.0", "ok"), ("v1.5.1", "ok"), ("v1.3.0", "warning")):
        found = await of_gateway(bundle_version=version, channel="standard")
        assert found["found"].startswith(f"Gateway API {version}, standard channel")
        assert found["result"] == result
    assert found["todo"] == "Weft knows v1.4 to v1.6"
    versions = server.get(CRD, f"gateways.{GROUP}", "")["spec"]["versions"]
    for one in versions:
        one["name"] = f"{one['name']}alpha9"
    server.change(crd, {"spec": {"versions": versions}})
    found = await of_gateway(bundle_version="v1.6.1")
    assert found["result"] == "failed"
    assert "Weft reads v1" in found["todo"]


async def test_checks_of_a_host():
    """Each says what it found, and what to do where that is not well."""
    code, said = await weft("check", "--only=host", "-o", "json")
    findings = {one["what"]: one for one in json.loads(said)}
    assert code == 0
    assert findings["kernel"]["found"] == platform.release()
    assert all((one["result"] == "ok") == (one["todo"] == "") for one in findings.values())
    if findings["user"]["result"] == "ok" and findings["cgroup v2"]["result"] == "ok":
        assert {f"eBPF {name}" for name in selftest.FACTS} <= findings.keys()


def test_checks_of_a_node(tmp_path):
    def found():
        return {one.what: one for one in check_node.node(tmp_path)}

    assert {one.result for one in found().values()} == {"warning"}
    assert all(one.todo for one in found().values())
    conf, bin_dir = tmp_path / "etc/cni/net.d", tmp_path / "opt/cni/bin"
    for one in (conf, bin_dir):
        one.mkdir(parents=True)
    about = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}
    (conf / "10.conflist").write_text(json.dumps(about))
    assert found()["CNI"].result == "ok"
    about["plugins"].append({"type": "weft-cni"})
    (conf / "10.conflist").write_text(json.dumps(about))
    broken = found()["CNI"]
    assert broken.result == "failed"
    assert broken.found == f"{conf}/10.conflist: bridge, weft-cni; weft-cni is not in {bin_dir}"
    # As the agent's container has the node's directories.
    (tmp_path / "run/host/cni").mkdir(parents=True)
    conf.rename(tmp_path / "run/host/cni/net.d")
    bin_dir.rename(tmp_path / "run/host/cni/bin")
    (tmp_path / "run/host/cni/bin/weft-cni").touch()
    assert found()["CNI"].result == "ok"


@needs_crds
async def test_checks_name_each_right_that_is_missing(server, tmp_path):
    """Of who would install, and of what is installed: exactly those of the manifests' roles."""
    server.install_crds(CRDS)
    for obj in manifests.objects():
        server.create(obj)
    server.auth.token("admin", "admin", groups=["system:masters"])
    server.auth.token("somebody", "somebody")
    server.auth.rbac = True
    config = server.kubeconfig(tmp_path / "kubeconfig")

    async def findings():
        _, said = await weft("check", f"--kubeconfig={config}", "--only=cluster", "-o", "json")
        return {one["what"]: one for one in json.loads(said)}

    found = await findings()
    accounts = ("this user", "weft-agent", "weft-controller")
    assert [found[f"rights of {who}"]["result"] for who in accounts] == ["ok"] * 3
    role = server.get("rbac.authorization.k8s.io/clusterroles", "weft-agent", "")
    for rule in role["rules"]:
        rule["resources"] = [one for one in rule["resources"] if one != "nodes"]
    server.change(role, {"rules": role["rules"]})
    of_agent = (await findings())["rights of weft-agent"]
    assert (of_agent["result"], of_agent["found"]) == ("failed", "may not list nodes; watch nodes")
    server.kubeconfig(config, token="somebody")
    for obj in _reviewer():
        server.create(obj)
    mine = (await findings())["rights of this user"]
    for right in (
        "create namespaces",
        "patch daemonsets.apps in weft-system",
        "update secrets weft-authority in weft-system",
        "sign signers.certificates.k8s.io weft.dev/workload",
        "patch httproutes/status.gateway.networking.k8s.io",
    ):
        assert right in mine["found"]


def _reviewer():
    """What everybody may in a cluster ("Discovery roles", system:basic-user)."""
    rule = {"apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews"]}
    metadata = {"name": "system:basic-user"}
    rbac = "rbac.authorization.k8s.io"
    about = {"apiVersion": f"{rbac}/v1", "metadata": metadata}
    yield {**about, "kind": "ClusterRole", "rules": [{**rule, "verbs": ["create"]}]}
    ref = {"apiGroup": rbac, "kind": "ClusterRole", "name": "system:basic-user"}
    subject = {"apiGroup": rbac, "kind": "Group", "name": "system:authenticated"}
    yield {**about, "kind": "ClusterRoleBinding", "roleRef": ref, "subjects": [subject]}


def test_a_cluster_that_is_not_there(tmp_path):
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "none"}
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(cli, ["install", f"--kubeconfig={file}"])
    assert result.exit_code == 1
    assert str(file) in result.output


def test_deploy_is_what_install_applies():
    script = [sys.executable, str(PROJECT / "scripts/deploy.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0
    result = CliRunner().invoke(cli, ["install", "--dry-run"])
    printed = list(yaml.safe_load_all(result.output))
    assert printed == manifests.objects()


def test_an_agent_that_is_stopped_has_the_time_that_it_takes():
    (agent,) = [one for one in manifests.objects() if one["kind"] == "DaemonSet"]
    pod = agent["spec"]["template"]["spec"]
    args = supervisor.parser().parse_known_args(pod["containers"][0]["args"])[0]
    takes_s = supervisor.LEAVE_S + args.drain_delay + args.drain_timeout + 2 * supervisor.GRACE_S
    assert args.drain_delay > 0
    assert takes_s < pod["terminationGracePeriodSeconds"]


def test_the_chart_is_what_install_applies():
    """By the few rules of Helm's templates that the chart makes use of."""
    chart = PROJECT / "deploy/chart"
    values = yaml.safe_load((chart / "values.yaml").read_text())
    assert values["steer"]
    assert values["agentArgs"] == values["controllerArgs"] == []
    text = "---\n".join(one.read_text() for one in sorted((chart / "templates").glob("*.yaml")))
    text = re.sub(r"\n *{{- range .*?{{- end }}", "", text, flags=re.S)
    settings = "".join(f"\n    {line}" for line in yaml.dump(values["settings"]).splitlines())
    text = text.replace("\n    {{- .Values.settings | toYaml | nindent 4 }}", settings)
    text = text.replace("{{ .Release.Namespace }}", NAMESPACE)
    for name in ("image", "trustDomain", "cniBinDir", "cniConfDir"):
        text = text.replace(f"{{{{ .Values.{name} }}}}", values[name])
    text = re.sub(r"^{{- (if .Values.steer|end) }}\n", "", text, flags=re.M)
    assert "{{" not in text
    _as_installed(yaml.safe_load_all(text))


def test_the_chart_as_helm_renders_it():
    """With Helm's own library (pip install helm-python-sdk, 240 MB), where it is there."""
    pytest.importorskip("helm_python")
    done = subprocess.run(
        [sys.executable, "-c", _RENDER, str(PROJECT / "deploy/chart"), NAMESPACE],
        stdout=subprocess.PIPE,
        check=True,
    )
    plain, other, gateway_only = json.loads(done.stdout)
    for rendered, steer in ((plain, True), (gateway_only, False)):
        found = [one for text in rendered.values() for one in yaml.safe_load_all(text)]
        _as_installed(found, steer=steer)
    objects = [one for text in other.values() for one in yaml.safe_load_all(text)]
    by_kind = {one["kind"]: one for one in objects if one["kind"] in ("DaemonSet", "Deployment")}
    for kind, wanted in (("DaemonSet", ["--x", "a b"]), ("Deployment", ["--load-balancer"])):
        (container,) = by_kind[kind]["spec"]["template"]["spec"]["containers"]
        assert container["args"][-1 - len(wanted) :] == ["--trust-domain=other.example", *wanted]
        assert container["image"] == "other:1"
    volumes = by_kind["DaemonSet"]["spec"]["template"]["spec"]["volumes"]
    assert {"path": "/other/net.d", "type": "DirectoryOrCreate"} in [
        one.get("hostPath") for one in volumes
    ]
    (settings,) = [one for one in objects if one["kind"] == "ConfigMap"]
    assert yaml.safe_load(settings["data"]["settings.yaml"]) == {"access_log": "off", "n": [1]}


_RENDER = """
import sys, json, helm_python
chart = helm_python.Chart.load(sys.argv[1])
other = {
    "image": "other:1",
    "trustDomain": "other.example",
    "cniConfDir": "/other/net.d",
    "settings": {"access_log": "off", "n": [1]},
    "agentArgs": ["--x", "a b"],
    "controllerArgs": ["--load-balancer"],
}
values = {}, other, {"steer": False}
found = [chart.render(given, name="weft", namespace=sys.argv[2]) for given in values]
print(json.dumps([{k: v for k, v in one.items() if k.endswith(".yaml")} for one in found]))
"""


def _as_installed(objects, *, steer=True):
    # Weft's own namespace is Helm's to make.
    own = path_of({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    wanted = (one for one in manifests.objects(steer=steer) if path_of(one) != own)
    assert sorted(objects, key=path_of) == sorted(wanted, key=path_of)


@needs_crds
@needs_kubectl
async def test_kubectl_applies_the_kustomization(server, tmp_path):
    """As a user does who has no weft: checked by kubectl first, made, and the same as installed."""
    server.install_crds(CRDS)
    config = server.kubeconfig(tmp_path / "kubeconfig")
    for dry_run in (["--dry-run=client"], []):
        process = await asyncio.create_subprocess_exec(
            *(KUBECTL, f"--kubeconfig={config}", f"--cache-dir={tmp_path}/cache", "apply"),
            *("-k", str(PROJECT / "deploy/manifests"), *dry_run),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()
        assert said.decode().count(" created") == len(manifests.objects())
    made = stored(server)
    assert {(one["kind"], one["metadata"]["name"]) for one in manifests.objects()} <= made
    revision = server.store.revision
    code, said = await weft("install", f"--kubeconfig={config}")
    assert code == 0, said
    pod = server.get("apps/daemonsets", "weft-agent", NAMESPACE)
    assert pod["metadata"]["generation"] == 1
    assert stored(server) == made
    assert server.store.revision > revision


@needs_kubectl
@pytest.mark.parametrize(("directory", "steer"), [("manifests", True), ("gateway-only", False)])
def test_the_kustomization_is_whole(directory, steer):
    command = [KUBECTL, "kustomize", str(PROJECT / "deploy" / directory)]
    built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = sorted(yaml.safe_load_all(built), key=path_of)
    assert found == sorted(manifests.objects(steer=steer), key=path_of)
    result = CliRunner().invoke(cli, ["install", "--dry-run", *([] if steer else ["--no-steer"])])
    assert sorted(yaml.safe_load_all(result.output), key=path_of) == found


@needs_kubectl
def test_the_kustomization_takes_another_image_by_one_line(tmp_path):
    """The README's."""
    readme = (PROJECT / "README.md").read_text()
    (line,) = re.findall(r"^\$ (sed .*kustomization.yaml) && kubectl apply -k", readme, re.M)
    shutil.copytree(PROJECT / "deploy/manifests", tmp_path / "deploy/manifests")
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    command = [KUBECTL, "kustomize", str(tmp_path / "deploy/manifests")]
    built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = sorted(yaml.safe_load_all(built), key=path_of)
    assert found == sorted(manifests.objects(image="REGISTRY/weft:0.1.0"), key=path_of)


@needs_crds
@needs_cilium_crds
async def test_roles_allow_what_is_asked_for_and_nothing_else(server, tmp_path):
    """Agent and controller as they are, on a server that enforces the roles of the manifests, doing
    everything once. Each verb of each resource in each role is made use of."""
    server.install_crds(CRDS)
    for crd in cilium_crds(conditions=True):
        server.create(crd)
    for obj in (*manifests.objects(), *_one_of_each()):
        server.create(obj)
    # Each status is in conflict once.
    for plural in (*_WITH_STATUS, "ciliumnetworkpolicies", "ciliumclusterwidenetworkpolicies"):
        server.faults.once[f"/{plural}/one/status"] = 409
    agent, controller = (f"system:serviceaccount:{NAMESPACE}:weft-{n}" for n in _COMPONENTS)
    await _let_in(server)
    of_agent = server.kubeconfig(tmp_path / "agent", token="agent")
    of_controller = server.kubeconfig(tmp_path / "controller", token="controller")
    world = World(server, tmp_path)
    options = (f"--kubeconfig={of_agent}", "--workers=1", "--admin=off", "--node=a")
    options += ("--authority=cluster", f"--secrets-namespace={NAMESPACE}-secrets")
    about = ControllerOptions(
        of_controller,
        NAMESPACE,
        "one",
        trust_domain="cluster.local",
        mesh=True,
        load_balancer=True,
        secrets_namespace=f"{NAMESPACE}-secrets",
    )
    used = server.auth.used
    with running(tmp_path / "run", *options) as process:
        found = Controller(about, backoff=quick)
        client = Client(of_agent)
        await client.open()
        follows = spawn(DaemonSet(client, NAMESPACE).run(), name="DaemonSet")
        task = asyncio.get_running_loop().create_task(found.run())
        try:
            await asyncio.to_thread(process.await_status, lambda status: status["ready"])
            await world.until(lambda: world.conditions("httproutes", "one")["Accepted"] == "True")
            await _everything(world, found)
            await world.until(
                lambda: server.auth.granted(agent) | server.auth.granted(controller) <= used
            )
        except TimeoutError:
            unused = (server.auth.granted(agent) | server.auth.granted(controller)) - used
            pytest.fail(f"never asked for: {sorted(unused)}")
        finally:
            follows.cancel()
            task.cancel()
            await asyncio.gather(task, follows, return_exceptions=True)
            await client.close()
            # While the server answers: it is told that the node leaves.
            await asyncio.to_thread(process.stop)
    assert server.auth.denied == []


async def test_an_agent_learns_that_it_is_removed_whoever_goes_first(server, tmp_path):
    """Roles go at once after the DaemonSet: by then it may ask nobody any more."""
    for obj in manifests.objects():
        if obj["kind"] != "GatewayClass":
            server.create(obj)
    await _let_in(server)
    client = Client(server.kubeconfig(tmp_path / "agent", token="agent"))
    await client.open()
    followed = DaemonSet(client, NAMESPACE)
    task = spawn(followed.run(), name="DaemonSet")
    try:
        async with asyncio.timeout(20):
            while not any("watch=true" in path for _, path in server.requests):
                await asyncio.sleep(0.01)
            daemonset = server.get("apps/daemonsets", "weft-agent", NAMESPACE)
            for obj in manifests.objects():
                if obj["kind"] in ("Role", "RoleBinding"):
                    server.delete(obj)
            # Another image, as an upgrade has it, then without the mesh, then with it again.
            versions = [copy.deepcopy(daemonset) for _ in range(3)]
            containers = [one["spec"]["template"]["spec"]["containers"] for one in versions]
            containers[0][0]["image"] = "weft:next"
            containers[1][0]["args"] = ["up", "--source=kubernetes"]
            followed.changed(None, versions[0])
            assert not followed.unwanted.is_set()
            server.change(daemonset, {"spec": versions[1]["spec"]})
            await followed.unwanted.wait()
            server.change(daemonset, {"spec": versions[2]["spec"]})
            while followed.unwanted.is_set():
                await asyncio.sleep(0.01)
            server.delete(daemonset)
            await followed.unwanted.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


_COMPONENTS = ("agent", "controller")
_WITH_STATUS = (
    *("gatewayclasses", "gateways", "listenersets", "httproutes", "grpcroutes"),
    "backendtlspolicies",
)


async def _let_in(server):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "weft-agent-a", "namespace": NAMESPACE},
        "spec": {"nodeName": "a", "serviceAccountName": "weft-agent"},
    }
    uid = server.create(pod)["metadata"]["uid"]
    bound = {
        "authentication.kubernetes.io/pod-name": ["weft-agent-a"],
        "authentication.kubernetes.io/pod-uid": [uid],
    }
    server.auth.service_account("agent", NAMESPACE, "weft-agent", extra=bound)
    server.auth.service_account("controller", NAMESPACE, "weft-controller")
    server.auth.token("admin", "admin", groups=["system:masters"])
    server.auth.rbac = True


def _one_of_each():
    """Objects named "one" of every kind that has a status."""
    yield tls_secret("one")
    server = gateway("one", port=8443)
    tls = {"certificateRefs": [{"name": "one"}]}
    https = {"name": "https", "port": 8443, "protocol": "HTTPS", "tls": tls}
    http = {"name": "http", "port": 8080, "protocol": "HTTP"}
    server["spec"]["listeners"] = [https, http]
    server["spec"]["allowedListeners"] = {"namespaces": {"from": "Same"}}
    yield gateway_class("one")
    server["spec"]["gatewayClassName"] = "one"
    yield server
    parent = {"parentRefs": [{"name": "one"}]}
    rule = {"backendRefs": [{"name": "one", "port": 80}]}
    specs = {
        "HTTPRoute": {**parent, "hostnames": ["a.example"], "rules": [rule]},
        "GRPCRoute": {**parent, "hostnames": ["b.example"], "rules": [rule]},
        "ListenerSet": {
            "parentRef": {"name": "one"},
            "listeners": [{"name": "more", "port": 8081, "protocol": "HTTP"}],
        },
        "BackendTLSPolicy": {
            "targetRefs": [{"group": "", "kind": "Service", "name": "one"}],
            "validation": {"hostname": "one.example", "wellKnownCACertificates": "System"},
        },
    }
    for kind, spec in specs.items():
        metadata = {"name": "one", "namespace": "default"}
        yield {"apiVersion": f"{GROUP}/v1", "kind": kind, "metadata": metadata, "spec": spec}
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "one", "namespace": "default"},
        "spec": {"ports": [{"port": 80}]},
    }
    for kind in ("NetworkPolicy", "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"):
        yield policy(kind, "one")


async def _everything(world, controller):
    """What happens seldom: an Event again, a Service and a copy of a Secret that are not needed any
    more, another root."""
    server = world.server
    obj = {
        "apiVersion": f"{GROUP}/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "one", "namespace": "default"},
    }
    for name, holds in (("nowhere", "False"), ("one", "True"), ("nowhere", "False")):
        backend = {"rules": [{"backendRefs": [{"name": name, "port": 80}]}]}
        server.change(obj, {"spec": backend})
        await world.until(
            lambda holds=holds: world.conditions("httproutes", "one")["ResolvedRefs"] == holds
        )
    await world.until(lambda: server.get("/services", "weft-one"))
    await world.until(lambda: server.get("/secrets", "default.one", f"{NAMESPACE}-secrets"))
    listeners = [{"name": "http", "port": 8080, "protocol": "HTTP"}]
    address = [{"type": "IPAddress", "value": "127.0.0.1"}]
    server.change(gateway("one"), {"spec": {"listeners": listeners, "addresses": address}})
    await world.until(lambda: server.get("/services", "weft-one") is None)
    authority = controller.certificates.authority
    authority._authority.rotate_root(time.time())
    authority.look_again()


def test_each_verb_of_the_roles_is_explained():
    """By name, in the comment that stands above it."""
    comment = before = ""
    verbs = 0
    for line in (PROJECT / "deploy/manifests/rbac.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment = f"{comment} {text}" if before.startswith("#") else text
        if found := re.match(r"verbs: \[(.*)\]", text):
            for verb in found[1].split(", "):
                assert re.search(rf"\b{verb}\b", comment), f"{verb}: {comment}"
                verbs += 1
        before = text
    assert verbs > 40


@needs_crds
async def test_an_agent_reads_no_secrets_but_the_copies(server, tmp_path):
    server.install_crds(CRDS)
    for obj in manifests.objects():
        server.create(obj)
    await _let_in(server)
    client = Client(server.kubeconfig(tmp_path / "agent", token="agent"))
    await client.open()
    try:
        copies = f"/api/v1/namespaces/{NAMESPACE}-secrets/secrets"
        assert (await client.request("GET", copies))["items"] == []
        for method, path in (
            ("GET", "/api/v1/secrets"),
            ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets"),
            ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/weft-authority"),
            ("GET", "/api/v1/namespaces/default/secrets/one"),
            ("DELETE", f"{copies}/one"),
            ("DELETE", f"/apis/{GROUP}/v1/namespaces/default/httproutes/one"),
        ):
            with pytest.raises(ServerError) as refused:
                await client.request(method, path)
            assert refused.value.status == 403
    finally:
        await client.close()
