"""lab.yaml: what is refused and how, and the addresses and names that follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mesh.cli.main import cli
from mesh.lab.config import read_config
from mesh.lab.errors import LabError
from mesh.lab.plan import Plan, make_plan
from mesh.lab.state import LabDir

EXAMPLE = Path(__file__).parents[1] / "examples" / "lab" / "lab.yaml"


def plan_of(tmp_path: Path, text: str, name: str = "t") -> Plan:
    file = tmp_path / "lab.yaml"
    file.write_text(text)
    return make_plan(read_config(file), name, tmp_path, Path("/cgroup"))


def errors_of(tmp_path: Path, text: str) -> list[str]:
    """The lines of the refusal, without the file's name."""
    with pytest.raises(LabError) as refused:
        plan_of(tmp_path, text)
    prefix = f"{tmp_path / 'lab.yaml'}: "
    lines = str(refused.value).splitlines()
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nodes: [", "not YAML at line 2"),
        ("nodes: [{name: a}]\n---\nnodes: [{name: a}]", "has 2 YAML documents"),
        ("nodes: [{name: a}]\nnodes: []", "nodes: given twice"),
        ("pods: []", "nodes: required"),
        ("nodes: []", "nodes: a lab has at least one node"),
        ("name: Shop\nnodes: [{name: a}]", "name: pattern:"),
        ("nodes: [{name: a}, {name: a}]", "nodes[1].name: names of nodes are unique: 'a' is also"),
        ("nodes: [{name: a, color: red}]", "nodes[0].color: unknown field"),
        ("nodes: [{name: a}]\npods: [{name: p, node: b}]", "pods[0].node: one of the lab's nodes"),
        ("nodes: [{name: a}]\npods: [{name: p, command: sh}]", "pods[0].command: type: array"),
        (
            "nodes: [{name: a}]\npods: [{name: p-1}, {name: p, replicas: 2}]",
            "pods[1].name: names of pods are unique: 'default/p-1' is also that of pods[0]",
        ),
        ("nodes: [{name: a}]\npods: [{name: p, namespace: node}]", "pods[0].namespace: node and"),
        ("nodes: [{name: a}]\npods: [{name: p, labels: {a: 'b c'}}]", "pods[0].labels.a: a label"),
        ("nodes: [{name: a}]\npods: [{name: p, env: {A=B: c}}]", "pods[0].env: a name without"),
        (
            "nodes: [{name: a}]\nservices: [{name: s, ports: [{port: 80, targetPort: http}]}]",
            "services[0].ports[0].targetPort: a port number, or the name",
        ),
        ("nodes: [{name: a}]\nservices: [{name: s}]", "services[0].ports: at least one port"),
        (
            "nodes: [{name: a}]\nservices: [{name: s, ports: [{port: 1}, {port: 2}]}]",
            "services[0].ports[1].name: names of ports of a Service are unique",
        ),
        (
            "nodes: [{name: a}]\nservices: [{name: s, selector: {}, headless: true}]",
            "services[0].selector: a Service of the lab selects pods",
        ),
        (
            "nodes: [{name: a}]\nranges: {pods: [10.0.0.0/25, 'fd00::/48']}",
            "ranges.pods[0]: has room for a /24 for each of 1 nodes",
        ),
        (
            "nodes: [{name: a}]\nranges: {pods: ['fd00::/48', 10.0.0.0/8]}",
            "ranges.pods[0]: the first range is IPv4",
        ),
        ("nodes: [{name: a}]\nranges: {pods: [10.0.0.0/8]}", "ranges.pods: minItems: 2"),
        (
            "nodes: [{name: a}]\nranges: {nodes: [10.244.7.0/24, 'fd01::/64']}",
            "ranges.nodes[0]: does not overlap with ranges.pods[0]",
        ),
        (
            "nodes: [{name: a}]\nranges: {services: [10.0.0.1/8, 'fd01::/64']}",
            "ranges.services[0]: an address range: 10.0.0.1/8 has host bits set",
        ),
        ("nodes: [{name: a}]\nmanifests: [none]", "manifests[0]: a directory, or a file"),
        ("nodes: [{name: a}]\nmanifests: [., /dev/null]", "manifests[1]: a directory, or a file"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, error: str) -> None:
    assert [line for line in errors_of(tmp_path, text) if line.startswith(error)]


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = "nodes: [{name: a}]\npods: [{name: p, node: b}, {name: q, node: c}]"
    assert len(errors_of(tmp_path, text)) == 2


def test_too_many_pods_for_a_node(tmp_path: Path) -> None:
    text = "nodes: [{name: a}]\npods: [{name: p, replicas: 254}]"
    with pytest.raises(LabError, match="node a would get more than 253 pods: add nodes"):
        plan_of(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")


def test_pods_spread_over_nodes_and_have_addresses_of_their_node(tmp_path: Path) -> None:
    text = "nodes: [{name: a}, {name: b}]\npods: [{name: p, replicas: 3}, {name: q, node: b}]"
    plan = plan_of(tmp_path, text)
    assert [(pod.name, pod.node, pod.addresses) for pod in plan.pods] == [
        ("p-1", "a", ("10.244.0.2", "fd00:10:244::2")),
        ("p-2", "b", ("10.244.1.2", "fd00:10:244:1::2")),
        ("p-3", "a", ("10.244.0.3", "fd00:10:244::3")),
        ("q", "b", ("10.244.1.3", "fd00:10:244:1::3")),
    ]
    assert [node.pod_ranges for node in plan.nodes] == [
        ("10.244.0.0/24", "fd00:10:244::/64"),
        ("10.244.1.0/24", "fd00:10:244:1::/64"),
    ]


def test_defaults_of_pods_and_services(tmp_path: Path) -> None:
    text = "nodes: [{name: a}]\npods: [{name: p}]\nservices: [{name: p, ports: [{port: 80}]}]"
    plan = plan_of(tmp_path, text)
    assert plan.pods[0].labels == {"app": "p"}
    assert plan.pods[0].service_account == "default"
    assert plan.pods[0].cgroup == "/cgroup/t/a/default.p"
    assert plan.services[0].selects(plan.pods[0])
    assert plan.services[0].cluster_ips == ("10.96.0.10", "fd00:10:96::a")


def test_no_two_places_share_a_name_or_an_address() -> None:
    config = read_config(EXAMPLE)
    plans = [make_plan(config, name, EXAMPLE.parent, Path("/cgroup")) for name in ("a", "a-b")]
    places = [place for plan in plans for place in (*plan.pods, *plan.nodes, *plan.outside)]
    assert len({place.netns for place in places}) == len(places)
    assert len({place.cgroup for place in places}) == len(places)
    addresses = [one for place in (*plans[0].pods, *plans[0].nodes) for one in place.addresses]
    addresses += [one for service in plans[0].services for one in service.cluster_ips]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a.b", "a" * 33])
def test_names_of_labs(tmp_path: Path, name: str) -> None:
    with pytest.raises(LabError, match="cannot name a lab"):
        LabDir(tmp_path, name)


def test_an_option_is_not_taken_for_a_command(tmp_path: Path) -> None:
    arguments = ("lab", "exec", "web", "--run-dir", str(tmp_path), "--", "true")
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "--run-dir: options stand before POD" in result.stderr


def test_what_is_no_lab_is_not_removed(tmp_path: Path) -> None:
    precious = tmp_path / "mine" / "file"
    precious.parent.mkdir()
    precious.touch()
    plan = make_plan(read_config(EXAMPLE), "mine", tmp_path, Path("/cgroup"))
    with pytest.raises(LabError, match="mine exists and is no lab: choose another"):
        LabDir(tmp_path, "mine").create(plan)
    LabDir(tmp_path, "mine").remove()
    assert precious.exists()


def test_a_run_directory_that_is_too_long(tmp_path: Path) -> None:
    plan = make_plan(read_config(EXAMPLE), "mine", tmp_path, Path("/cgroup"))
    with pytest.raises(LabError, match="is too long for a socket"):
        LabDir(tmp_path / ("long" * 30), "mine").create(plan)


def test_the_journal_goes_last(tmp_path: Path) -> None:
    plan = make_plan(read_config(EXAMPLE), "mine", tmp_path, Path("/cgroup"))
    lab = LabDir(tmp_path, "mine")
    lab.create(plan)
    assert lab.plan() == plan
    lab.remove()
    assert list(tmp_path.iterdir()) == []
    # Killed before there was a journal.
    lab.path.mkdir()
    (lab.path / ".plan.json.7").touch()
    lab.remove()
    assert list(tmp_path.iterdir()) == []


def test_places_by_name(tmp_path: Path) -> None:
    text = """
nodes: [{name: a}]
outside: [{name: a}]
pods: [{name: p}, {name: p, namespace: other}, {name: q}]
"""
    plan = plan_of(tmp_path, text)
    assert plan.place("q").key == "default/q"
    assert plan.place("other/p").key == "other/p"
    assert plan.place("node/a").key == "node/a"
    with pytest.raises(LabError, match="'p' may be any of default/p, other/p: say which"):
        plan.place("p")
    with pytest.raises(LabError, match="'a' may be any of node/a, outside/a"):
        plan.place("a")
    with pytest.raises(LabError, match="has no 'x': it has default/p, "):
        plan.place("x")
