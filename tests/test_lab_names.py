"""Services of a lab as manifests and as DNS names."""

from __future__ import annotations

from pathlib import Path

import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from mesh.lab.config import LabConfig
from mesh.lab.dns import Names
from mesh.lab.manifests import endpoint_slices, nodes, pods, services, to_yaml
from mesh.lab.plan import make_plan
from mesh.lab.state import PodStatus
from mesh.model.meta import ObjectKey
from mesh.model.schema import read
from mesh.sources.directory import Manifests

CONFIG = {
    "nodes": [{"name": "a"}, {"name": "b"}],
    "pods": [
        {"name": "web", "namespace": "shop", "ports": [{"name": "http", "port": 8080}]},
        {
            "name": "new-web",
            "namespace": "shop",
            "node": "a",
            "labels": {"app": "web"},
            "ports": [{"name": "http", "port": 9090}],
        },
        {"name": "db", "namespace": "shop", "replicas": 30},
        {"name": "web", "namespace": "other"},
    ],
    "services": [
        {
            "name": "web",
            "namespace": "shop",
            "sessionAffinity": "ClientIP",
            "ports": [
                {"name": "http", "port": 80, "targetPort": "http", "appProtocol": "http"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
            ],
        },
        {"name": "db", "namespace": "shop", "headless": True},
    ],
}
PLAN = make_plan(read(CONFIG, LabConfig), "t", Path("/"), Path("/cgroup"))
DB = [pod.addresses for pod in PLAN.pods if pod.name.startswith("db-")]
NAMES = Names(PLAN, lambda service: DB)


def ask(name: str, kind: str = "A", names: Names = NAMES, **how: int) -> tuple[str, list[str]]:
    """The response code and the addresses."""
    question = DNSRecord.question(name, kind)
    if "edns" in how:
        question.add_ar(EDNS0(udp_len=how.pop("edns")))
    answer = names.answer(question.pack(), **how)
    assert answer is not None
    reply = DNSRecord.parse(answer)
    assert reply.header.id == question.header.id
    assert {QTYPE[record.rtype] for record in reply.rr} <= {kind}
    code = "truncated" if reply.header.tc else RCODE[reply.header.rcode]
    return code, [str(record.rdata) for record in reply.rr]


@pytest.mark.parametrize(
    ("name", "kind", "answer"),
    [
        ("web.shop.svc.cluster.local", "A", ("NOERROR", ["10.96.0.10"])),
        ("web.shop.svc.cluster.local.", "AAAA", ("NOERROR", ["fd00:10:96::a"])),
        ("WEB.Shop.svc.CLUSTER.local", "A", ("NOERROR", ["10.96.0.10"])),
        ("web.shop.svc.cluster.local", "TXT", ("NOERROR", [])),
        ("shop.svc.cluster.local", "A", ("NOERROR", [])),
        ("cluster.local", "A", ("NOERROR", [])),
        ("web.other.svc.cluster.local", "A", ("NXDOMAIN", [])),
        ("other.svc.cluster.local", "A", ("NXDOMAIN", [])),
        ("x.web.shop.svc.cluster.local", "A", ("NXDOMAIN", [])),
        ("web.shop", "A", ("NXDOMAIN", [])),
        ("web", "A", ("NXDOMAIN", [])),
        ("example.org", "AAAA", ("NXDOMAIN", [])),
    ],
)
def test_names(name: str, kind: str, answer: tuple[str, list[str]]) -> None:
    assert ask(name, kind) == answer


def test_a_headless_name_is_cut_to_what_the_client_takes() -> None:
    name = "db.shop.svc.cluster.local"
    everything = [v6 for _, v6 in DB]
    assert ask(name, "AAAA")[0] == "truncated"
    assert ask(name, "AAAA", edns=4096) == ("NOERROR", everything)
    assert ask(name, "AAAA", limit=65535) == ("NOERROR", everything)


def test_a_headless_name_without_ready_pods() -> None:
    name = "db.shop.svc.cluster.local"
    assert ask(name, names=Names(PLAN, lambda service: ())) == ("NOERROR", [])


@pytest.mark.parametrize("cut", range(1, 42, 3))
def test_what_is_no_query_gets_no_answer(cut: int) -> None:
    query = DNSRecord.question("web.shop.svc.cluster.local").pack()
    assert NAMES.answer(query[:cut]) is None
    assert NAMES.answer(DNSRecord.parse(query).reply().pack()) is None


@given(st.binary(max_size=100), st.binary(max_size=20), st.integers(0, 60))
def test_no_message_breaks_the_server(noise: bytes, patch: bytes, at: int) -> None:
    query = DNSRecord.question("web.shop.svc.cluster.local").pack()
    NAMES.answer(noise)
    NAMES.answer(query[:at] + patch + query[at + len(patch) :])


def test_the_source_reads_the_manifests_as_they_are_meant(tmp_path: Path) -> None:
    statuses = {
        pod.key: PodStatus(key=pod.key, phase="Running", ready=pod.name != "new-web")
        for pod in PLAN.pods
    }
    (tmp_path / "services.yaml").write_bytes(to_yaml([*nodes(PLAN), *services(PLAN)]))
    for node in PLAN.nodes:
        slices = endpoint_slices(PLAN, node.name, statuses)
        (tmp_path / f"{node.name}.yaml").write_bytes(to_yaml(slices))
    update = Manifests(tmp_path).scan()
    assert update.problems == ()
    objects = update.changes
    for node in PLAN.nodes:
        told = objects["Node"][ObjectKey("", node.name)].status.addresses
        assert [(one.type, one.address) for one in told] == [
            ("InternalIP", address) for address in node.addresses
        ]
    assert {str(key) for key in objects["Namespace"]} == {"shop", "other"}
    web = objects["Service"][ObjectKey("shop", "web")].spec
    assert web.cluster_ips == ("10.96.0.10", "fd00:10:96::a")
    assert web.session_affinity == "ClientIP"
    assert [(one.port, one.target_port, one.app_protocol) for one in web.ports] == [
        (80, "http", "http"),
        (53, 53, None),
    ]
    assert objects["Service"][ObjectKey("shop", "db")].spec.cluster_ip == "None"
    found = {
        (address, port.port, endpoint.conditions.ready, endpoint.node_name)
        for one in objects["EndpointSlice"].values()
        if one.metadata.labels["kubernetes.io/service-name"] == "web"
        for endpoint in one.endpoints
        for address in endpoint.addresses
        for port in one.ports
        if port.name == "http"
    }
    assert found == {
        ("10.244.0.2", 8080, True, "a"),
        ("fd00:10:244::2", 8080, True, "a"),
        ("10.244.0.3", 9090, False, "a"),
        ("fd00:10:244::3", 9090, False, "a"),
    }


def test_pods_are_as_an_api_server_has_them() -> None:
    plan = make_plan(
        read(
            {
                "nodes": [{"name": "a"}, {"name": "b"}],
                "pods": [
                    {
                        "name": "web",
                        "namespace": "shop",
                        "node": "a",
                        "labels": {"tier": "front"},
                        "annotations": {"weft.dev/sockmap": "disabled"},
                        "serviceAccount": "web",
                        "ports": [{"name": "http", "port": 8080}],
                    },
                    {"name": "far", "node": "b"},
                ],
            },
            LabConfig,
        ),
        "t",
        Path("/"),
        Path("/cgroup"),
    )
    status = PodStatus(key="shop/web", phase="Running", ready=True)
    (pod,) = pods(plan, "a", {"shop/web": status})
    assert pod == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "web",
            "namespace": "shop",
            "uid": "t.shop.web.0",
            "labels": {"tier": "front"},
            "annotations": {"weft.dev/sockmap": "disabled"},
        },
        "spec": {
            "nodeName": "a",
            "serviceAccountName": "web",
            "containers": [
                {
                    "name": "main",
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                }
            ],
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "podIP": "10.244.0.2",
            "podIPs": [{"ip": "10.244.0.2"}, {"ip": "fd00:10:244::2"}],
        },
    }


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        (PodStatus(key="default/p", phase="Pending"), "Pending"),
        (PodStatus(key="default/p", phase="Exited", exit_code=0), "Succeeded"),
        (PodStatus(key="default/p", phase="Exited", exit_code=-9), "Failed"),
        (PodStatus(key="default/p", phase="Failed", message="no such program"), "Failed"),
        (
            PodStatus(
                key="default/p", phase="Terminating", deletion_timestamp="2024-05-01T10:00:00Z"
            ),
            "Running",
        ),
        (PodStatus(key="default/p", phase="Stopped"), None),
    ],
)
def test_a_pods_status_follows_its_life(status: PodStatus, phase: str | None) -> None:
    config = read({"nodes": [{"name": "a"}], "pods": [{"name": "p"}]}, LabConfig)
    plan = make_plan(config, "t", Path("/"), Path("/cgroup"))
    found = list(pods(plan, "a", {"default/p": status}))
    assert [pod["status"]["phase"] for pod in found] == ([] if phase is None else [phase])
    for pod in found:
        assert pod["status"]["conditions"] == [{"type": "Ready", "status": "False"}]
        assert pod["metadata"].get("deletionTimestamp") == status.deletion_timestamp
