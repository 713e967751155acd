"""Certificates in a cluster: the agent's requests, the signer's answers, and who gets none."""

import asyncio
import base64
import time

import pytest
from apiserver.objects import Who
from apiserver.server import ApiServer
from certs_world import TODAY
from controller_world import NAMESPACE, World
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from kube_world import WAIT_S

from certs.bundle import Bundle
from certs.issue import Issuer
from certs.spiffe import gateway, workload
from certs.svid import new_request
from mesh.agent.authority import NoAnswer
from mesh.agent.authority_cluster import ClusterAuthority
from mesh.model.nodereport import SIGNER
from mesh.sources.kubernetes_client import Client

DOMAIN = "cluster.local"
CSR = "certificates.k8s.io/certificatesigningrequests"


def pod(name, node, account="default", namespace="shop"):
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"nodeName": node, "serviceAccountName": account, "containers": [{"name": "c"}]},
    }


@pytest.fixture
async def world(tmp_path):
    async with ApiServer(bookmark_s=0.1) as server:
        for name in (NAMESPACE, "shop"):
            server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        server.create(pod("web-1", "a", "web"))
        server.create(pod("cart-1", "b", "cart"))
        server.auth.token("admin", "admin", groups=["system:masters"])
        found = World(server, tmp_path)
        found.clients = []
        for node in ("a", "b"):
            agent = server.create(pod(f"weft-agent-{node}", node, "weft-agent", NAMESPACE))
            found.token(node, agent)
        yield found
        for task in found.tasks:
            task.cancel()
        await asyncio.gather(*found.tasks, return_exceptions=True)
        for client in found.clients:
            await client.close()


def token(self, name, pod, account="weft-agent", **other):
    """A token of a service account, bound to a pod."""
    extra = {
        "authentication.kubernetes.io/pod-name": [pod["metadata"]["name"]],
        "authentication.kubernetes.io/pod-uid": [pod["metadata"]["uid"]],
        "authentication.kubernetes.io/node-name": [pod["spec"]["nodeName"]],
    }
    self.server.auth.service_account(name, NAMESPACE, account, extra=extra | other)


async def agent(self, name):
    """An agent's way to the authority, with a token of this name."""
    file = self.kubeconfig.with_name(f"kubeconfig-{name}")
    client = Client(self.server.kubeconfig(file, token=name))
    await client.open()
    self.clients.append(client)
    return ClusterAuthority(client, name, NAMESPACE)


World.token, World.agent = token, agent


def request(account, namespace="shop"):
    return new_request(workload(DOMAIN, namespace, account))[1]


def identity(chain_pem):
    leaf = x509.load_pem_x509_certificate(chain_pem.encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uri


async def test_identities_of_pods_on_the_node_that_asks_and_no_others(world):
    world.start(trust_domain=DOMAIN)
    a = await world.agent("a")
    answers = await a.sign([request("web"), new_request(gateway(DOMAIN))[1], request("cart")])
    assert identity(answers[0].chain_pem) == f"spiffe://{DOMAIN}/ns/shop/sa/web"
    assert identity(answers[1].chain_pem) == str(gateway(DOMAIN))
    assert (answers[2].chain_pem, answers[2].refused) == ("", "not_on_this_node")
    # Where the pod goes, its identity goes.
    world.server.delete(pod("web-1", "a"))
    world.server.create(pod("web-1", "b", "web"))
    b = await world.agent("b")
    async with asyncio.timeout(WAIT_S):
        while not (await b.sign([request("web")]))[0].chain_pem:
            pass
    (answer,) = await a.sign([request("web")])
    assert answer.refused == "not_on_this_node"


async def test_a_static_pod_has_no_identity(world):
    """A node makes the mirrors of its own in whatever namespace it likes, without asking for a
    service account."""
    mirror = pod("static", "a")
    mirror["metadata"]["annotations"] = {"kubernetes.io/config.mirror": "x"}
    del mirror["spec"]["serviceAccountName"]
    world.server.create(mirror)
    world.start(trust_domain=DOMAIN)
    answers = await (await world.agent("a")).sign([request("web"), request("default")])
    assert answers[0].chain_pem
    assert (answers[1].chain_pem, answers[1].refused) == ("", "not_on_this_node")


async def test_a_pod_in_its_hosts_network_gives_its_node_no_identity(world):
    """It is not in the mesh."""
    host = pod("host-1", "a", "host")
    host["spec"]["hostNetwork"] = True
    world.server.create(host)
    world.start(trust_domain=DOMAIN)
    answers = await (await world.agent("a")).sign([request("web"), request("host")])
    assert [one.refused for one in answers] == ["", "not_on_this_node"]


@pytest.mark.parametrize(
    "who",
    [
        {"account": "another"},
        {"authentication.kubernetes.io/pod-uid": ["of a pod before"]},
        {"authentication.kubernetes.io/pod-name": []},
        {"authentication.kubernetes.io/node-name": ["b"]},
    ],
)
async def test_nobody_else_gets_anything(world, who):
    obj = world.server.get("/pods", "weft-agent-a", NAMESPACE)
    world.token("other", obj, **who)
    world.start(trust_domain=DOMAIN)
    (answer,) = await (await world.agent("other")).sign([request("web")])
    assert (answer.chain_pem, answer.refused) == ("", "not_on_this_node")


async def test_requests_that_are_none(world):
    world.start(trust_domain=DOMAIN)
    a = await world.agent("a")
    answers = await a.sign(["no PEM", request("web").replace("\n", "\nAAAA\n", 3)])
    assert [answer.refused for answer in answers] == ["malformed", "malformed"]
    # Other signers' requests are not looked at.
    other = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": "other"},
        "spec": {
            "request": base64.b64encode(request("web").encode()).decode(),
            "signerName": "example.com/other",
            "usages": ["client auth"],
        },
    }
    user = world.server.auth.user("Bearer a")
    target = world.server.target(other)
    world.server.objects.create(target, other, Who("test", user))
    (answer,) = await a.sign([request("web")])
    assert answer.chain_pem
    assert not world.server.get(CSR, "other", "").get("status")


def asked(world, name, account, node="a", conditions=()):
    """A request as an agent has made it, and as somebody has decided it."""
    obj = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": name},
        "spec": {
            "request": base64.b64encode(request(account).encode()).decode(),
            "signerName": SIGNER,
            "usages": ["digital signature", "client auth", "server auth"],
        },
    }
    user = world.server.auth.user(f"Bearer {node}")
    world.server.objects.create(world.server.target(obj), obj, Who("test", user))
    if conditions:
        world.server.change(obj, {"status": {"conditions": list(conditions)}}, "approval")


def condition(kind):
    return {"type": kind, "status": "True", "reason": "Test", "message": "by a test"}


async def test_what_was_approved_and_may_not_be_had_any_more_fails(world):
    """The leader before approved it and died; its pod has gone. Or somebody approved what nobody
    may have. It cannot be denied any more, and others are answered."""
    asked(world, "gone", "cart", conditions=[condition("Approved")])
    asked(world, "still", "web", conditions=[condition("Approved")])
    world.start(trust_domain=DOMAIN)

    def status(name):
        return world.server.get(CSR, name, "")["status"]

    failed = await world.until(lambda: status("gone")["conditions"][1])
    assert (failed["type"], failed["reason"]) == ("Failed", "not_on_this_node")
    assert "certificate" not in status("gone")
    await world.until(lambda: status("still")["certificate"])
    (answer,) = await (await world.agent("a")).sign([request("web")])
    assert answer.chain_pem


async def test_requests_wait_for_the_authority(world):
    """One whose turn comes just when the authority begins to write down its next state is answered
    after that, with nothing else to remind the signer."""
    controller, _ = world.start(trust_domain=DOMAIN)
    await (await world.agent("a")).sign([request("web")])
    ready = controller.certificates.authority.ready
    ready.clear()
    asked(world, "waits", "web")
    async with asyncio.timeout(WAIT_S):
        while "waits" not in controller.certificates._signer._open:
            await asyncio.sleep(0.01)
    ready.set()
    ready.clear()
    # The signer's turn.
    await asyncio.sleep(0.01)
    ready.set()
    await world.until(lambda: world.server.get(CSR, "waits", "")["status"]["certificate"])


async def test_a_request_that_cannot_be_answered_holds_up_no_other(world):
    world.server.faults.about, world.server.faults.codes = "/stuck/", (500,)
    world.server.faults.refuse = 1.0
    asked(world, "stuck", "web")
    world.start(trust_domain=DOMAIN)
    async with asyncio.timeout(WAIT_S):
        while not world.server.faults.refused:
            await asyncio.sleep(0.01)
        (answer,) = await (await world.agent("a")).sign([request("web")])
    assert answer.chain_pem
    world.server.faults.refuse = 0.0
    await world.until(lambda: world.server.get(CSR, "stuck", "")["status"]["certificate"])


async def test_the_next_controller_has_the_same_root(world):
    _, first = world.start("one", trust_domain=DOMAIN)
    a = await world.agent("a")
    (before,) = await a.sign([request("web")])
    bundle = await a.bundle("")
    assert before.chain_pem
    assert bundle.trust_domain == DOMAIN
    secret = world.server.get("/secrets", "weft-authority", NAMESPACE)
    name = f"weft.dev:workload:{DOMAIN}"
    mounted = world.server.get("certificates.k8s.io/clustertrustbundles", name, "")
    assert mounted["spec"]["trustBundle"] == bundle.bundles[DOMAIN]
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    world.start("two", trust_domain=DOMAIN)
    (after,) = await a.sign([request("web")])
    assert after.chain_pem
    assert (await a.bundle("")).bundles == bundle.bundles
    assert world.server.get("/secrets", "weft-authority", NAMESPACE) == secret


async def test_a_cluster_without_trust_bundles_for_pods_has_config_maps(world):
    resource = world.server.registry.by_id("certificates.k8s.io/clustertrustbundles")
    world.server.registry.remove("certificates.k8s.io", "clustertrustbundles")
    controller, first = world.start(trust_domain=DOMAIN)
    a = await world.agent("a")
    (answer,) = await a.sign([request("web")])
    assert answer.chain_pem
    roots = (await a.bundle("")).bundles[DOMAIN]

    def bundle(namespace="shop"):
        found = world.server.get("/configmaps", "weft-trust-bundle", namespace)
        return found["data"].get("ca.crt")

    for namespace in ("shop", "default", "kube-system", NAMESPACE):
        await world.until(lambda namespace=namespace: bundle(namespace) == roots)
    # A namespace that comes later; one that somebody has changed, one deleted.
    world.server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "new"}})
    await world.until(lambda: bundle("new") == roots)
    about = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "weft-trust-bundle", "namespace": "shop"},
    }
    world.server.change(about, {"data": {"ca.crt": "other"}})
    await world.until(lambda: bundle() == roots)
    world.server.delete(about)
    await world.until(lambda: bundle() == roots)
    authority = controller.certificates.authority
    authority._authority.rotate_root(time.time())
    authority.look_again()
    await world.until(lambda: bundle().count("BEGIN CERTIFICATE") == 2)
    # Once the cluster serves them, no ConfigMap is made any more; those that are there are kept.
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    world.server.registry.add(resource)
    world.server.change(about, {"data": {"ca.crt": "stale"}})
    world.server.delete({**about, "metadata": {**about["metadata"], "namespace": "new"}})
    world.start("two", trust_domain=DOMAIN)
    await world.until(lambda: bundle().count("BEGIN CERTIFICATE") == 2)
    name = f"weft.dev:workload:{DOMAIN}"
    assert world.server.get("certificates.k8s.io/clustertrustbundles", name, "")
    assert world.server.get("/configmaps", "weft-trust-bundle", "new") is None


async def test_without_a_controller_there_is_no_answer_and_no_bundle(world, monkeypatch):
    monkeypatch.setattr("mesh.agent.authority_cluster._SIGN_S", 0.05)
    a = await world.agent("a")
    with pytest.raises(NoAnswer, match="no controller has signed"):
        await a.sign([request("web")])
    with pytest.raises(NoAnswer, match="no trust bundle yet"):
        await a.bundle("")


# An object and an event at once.
_EVENT = (
    b'{"kind": "C", "metadata": {"name": "n", "resourceVersion": "1"},'
    b' "type": "%s", "object": %s}\n'
)


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>",
        b'{"kind": "CertificateSigningRequest"}',
        b'{"kind": "C", "metadata": {"name": "n", "resourceVersion": "1"}}\n',
        _EVENT % (b"ADDED", b'{"status": {"certificate": 5}}'),
        _EVENT % (b"ADDED", b'{"status": {"conditions": [{}]}}'),
        _EVENT % (b"ERROR", b'{"code": "x"}'),
    ],
)
async def test_answers_that_are_none(world, garbage, monkeypatch):
    monkeypatch.setattr("mesh.agent.authority_cluster._SIGN_S", 0.3)
    world.server.faults.garbage = {"": garbage}
    a = await world.agent("a")
    with pytest.raises(NoAnswer):
        await a.sign([request("web")])
    with pytest.raises(NoAnswer):
        await a.bundle("")


async def test_one_namespace_that_takes_no_bundle_holds_up_no_other(world, caplog):
    world.server.registry.remove("certificates.k8s.io", "clustertrustbundles")
    world.server.faults.garbage = {"/namespaces/default/configmaps/weft-trust-bundle": b"null"}
    world.start(trust_domain=DOMAIN)
    await world.until(lambda: world.server.get("/configmaps", "weft-trust-bundle", "shop"))
    await world.until(lambda: world.server.get("/configmaps", "weft-trust-bundle", "kube-system"))
    assert "namespace default" in caplog.text


async def test_a_request_that_nobody_answers_holds_up_no_other(world, monkeypatch):
    monkeypatch.setattr("mesh.agent.authority_cluster._SIGN_S", 0.5)
    a = await world.agent("a")
    asked = asyncio.ensure_future(a.sign([request("web"), cart := request("cart")]))

    def made():
        store = world.server.store
        found = [one for _, one in store.list(CSR, None, store.revision)]
        return [one for one in found if base64.b64decode(one["spec"]["request"]) == cart.encode()]

    await world.until(made)
    (one,) = made()
    answer = {"type": "Denied", "status": "True", "reason": "no", "message": "because"}
    world.server.change(one, {"status": {"conditions": [answer]}}, "approval")
    silent, denied = await asked
    assert (silent.refused, denied.refused, denied.why) == ("no_answer", "no", "because")
    # Nor do those before it take a request's time without end.
    a._turn = asyncio.Semaphore(0)
    with pytest.raises(NoAnswer, match="no controller has signed"):
        await asyncio.wait_for(a.sign([request("web")]), WAIT_S)


async def test_a_new_bundle_is_told_to_who_waits(world):
    controller, _ = world.start(trust_domain=DOMAIN)
    a = await world.agent("a")
    await a.sign([request("web")])
    have = await a.bundle("")
    waiting = asyncio.ensure_future(a.bundle(have.tag))
    await asyncio.sleep(0)
    authority = controller.certificates.authority
    authority._authority.rotate_root(time.time())
    authority.look_again()
    async with asyncio.timeout(WAIT_S):
        found = await waiting
    assert found.tag != have.tag
    assert found.bundles[DOMAIN].count("BEGIN CERTIFICATE") == 2
    assert a.have == have.tag


async def test_a_new_root_waits_for_nodes_that_are_away(world, caplog):
    """Theirs is the old bundle until they are back: what others would show them they could not
    believe. Nodes without identities are no matter; how long is the authority's to bound."""
    caplog.set_level("INFO", "weft.controller")
    controller, _ = world.start(trust_domain=DOMAIN)
    a = await world.agent("a")
    await a.sign([request("web")])
    have = await a.bundle("")
    world.report("a", bundle=have.tag)
    world.report("b", bundle=have.tag, lasts=1)
    world.report("gateway-only", bundle="")
    async with asyncio.timeout(WAIT_S):
        while "weft-node.b" not in controller.nodes._seen:
            await asyncio.sleep(0.01)
        while len(controller.nodes.ready()) != 2:
            await asyncio.sleep(0.01)
    authority = controller.certificates.authority

    def states():
        return [one.state for one in authority._authority.describe() if one.role == "root"]

    authority._authority.rotate_root(time.time())
    authority.look_again()
    new = await a.bundle(have.tag)
    world.report("a", bundle=new.tag)
    async with asyncio.timeout(WAIT_S):
        while "the next root waits for node b, which is away" not in caplog.text:
            await asyncio.sleep(0.01)
    assert sorted(states()) == ["active", "next"]
    world.report("b", bundle=new.tag)
    async with asyncio.timeout(WAIT_S):
        while sorted(states()) != ["active", "retiring"]:
            await asyncio.sleep(0.01)


# --- what the authority is given ------------------------------------------------------------------


def company(name="company"):
    return Issuer.new_root(name, TODAY)


def pem(issuer):
    return issuer.certificate.public_bytes(Encoding.PEM)


def bring(world, issuer, name="company-ca"):
    data = {"tls.crt": pem(issuer), "tls.key": issuer.key_pem(), "ca.crt": pem(issuer)}
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "type": "kubernetes.io/tls",
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }
    if world.server.get("/secrets", name, NAMESPACE):
        world.server.change(body, body)
    else:
        world.server.create(body)


async def roots_are(agent, *issuers):
    """Until nodes are told of these roots of the authority's own trust domain."""
    wanted, have = {one.certificate for one in issuers}, ""
    async with asyncio.timeout(WAIT_S):
        while True:
            found = await agent.bundle(have)
            if set(Bundle.from_pem(DOMAIN, found.bundles[DOMAIN]).roots) == wanted:
                return
            have = found.tag


async def test_an_authority_that_is_brought(world, caplog):
    """A Secret as cert-manager keeps it. There is no other root until it can be used; it is taken
    over when it changes, and what cannot be used leaves it in force."""
    world.start(trust_domain=DOMAIN, ca="company-ca")
    await said(caplog, "the authority does not work: Secret weft-system/company-ca is missing")
    assert world.server.get("/secrets", "weft-authority", NAMESPACE) is None
    first, second = company(), company("company 2")
    bring(world, first)
    a = await world.agent("a")
    (answer,) = await a.sign([request("web")])
    assert identity(answer.chain_pem) == f"spiffe://{DOMAIN}/ns/shop/sa/web"
    await roots_are(a, first)
    bring(world, second)
    await roots_are(a, first, second)
    about = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "company-ca", "namespace": NAMESPACE},
    }
    world.server.change(about, {"data": {"tls.crt": ""}})
    await said(caplog, "Secret weft-system/company-ca: tls.crt is missing")
    assert (await a.sign([request("web")]))[0].chain_pem
    assert not any("PRIVATE KEY" in one.getMessage() for one in caplog.records)


async def said(caplog, text):
    async with asyncio.timeout(WAIT_S):
        while not any(text in one.getMessage() for one in caplog.records):
            await asyncio.sleep(0.01)


async def test_roots_of_another_trust_domain(world, caplog):
    away, moved = company("away"), company("moved")
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "away", "namespace": NAMESPACE},
        "data": {"ca.crt": Bundle("example.org", [away.certificate]).to_document(1, 60).decode()},
    }
    world.server.create(config_map)
    world.start(trust_domain=DOMAIN, federation={"example.org": "away"})
    a = await world.agent("a")
    await a.sign([request("web")])
    found = await a.bundle("")
    assert Bundle.from_pem("x", found.bundles["example.org"]).roots == (away.certificate,)
    # Not for the pods: it is this trust domain's that they mount.
    mounted = world.server.get("/configmaps", "weft-trust-bundle", NAMESPACE)["data"]["ca.crt"]
    assert mounted == found.bundles[DOMAIN]
    world.server.change(config_map, {"data": {"ca.crt": "garbage"}})
    await said(caplog, "ConfigMap weft-system/away: the bundle of example.org holds no PEM")
    assert (await a.bundle("")).tag == found.tag
    world.server.change(config_map, {"data": {"ca.crt": pem(moved).decode()}})
    found = await a.bundle(found.tag)
    assert Bundle.from_pem("x", found.bundles["example.org"]).roots == (moved.certificate,)


async def test_rotation_as_it_is_asked_for(world):
    """By an annotation, which goes when it has begun; or another says why not."""
    world.start(trust_domain=DOMAIN)
    a = await world.agent("a")
    await a.sign([request("web")])
    about = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "weft-authority", "namespace": NAMESPACE},
    }

    def annotations():
        found = world.server.get("/secrets", "weft-authority", NAMESPACE)
        return found["metadata"].get("annotations") or {}

    async def rotated(what):
        world.server.change(about, {"metadata": {"annotations": {"weft.dev/rotate": what}}})
        await world.until(lambda: "weft.dev/rotate" not in annotations())
        return annotations()

    have = await a.bundle("")
    world.report("a", bundle="old")  # it never takes the next root
    assert await rotated("root") == {}
    found = await a.bundle(have.tag)
    assert found.bundles[DOMAIN].count("BEGIN CERTIFICATE") == 2
    (before,) = await a.sign([request("web")])
    assert "under way" in (await rotated("root"))["weft.dev/rotate-refused"]
    assert await rotated("intermediate") == {}
    (after,) = await a.sign([request("web")])
    assert issuers(before) != issuers(after)
    refused = (await rotated("everything"))["weft.dev/rotate-refused"]
    assert "'everything' cannot be rotated" in refused


def issuers(answer):
    return answer.chain_pem.partition("-----END")[2]
