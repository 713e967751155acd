"""The command line: what people type, what they read, and the exit codes that programs read."""

import json
import os
import socket
import subprocess
import sys
from unittest import mock

import pytest
import yaml
from click.testing import CliRunner

from mesh.agent.rundir import RunDir
from mesh.agent.unmet import unmet
from mesh.cli import output, tables
from mesh.cli.main import cli
from mesh.model.decode import KINDS
from tests.support.running import (
    PROJECT,
    WAIT_S,
    alarm,
    free_port,
    gateway,
    route,
    running,
    service,
)

BROKEN = "{apiVersion: v1, kind: Service, metadata: {name: b}, spec: {ports: [{port: 80, x: 1}]}}"


def weft(*arguments):
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def manifests(tmp_path):
    path = tmp_path / "manifests"
    path.mkdir()
    (path / "gateway.yaml").write_text(gateway(8080))
    (path / "routes.yaml").write_text(f"{route('r', path='/x')}\n---\n{service()}")
    return path


# --- offline -------------------------------------------------------------------------------------


def test_validate_says_that_all_is_well(manifests):
    assert weft("validate", manifests) == (
        0,
        "1 EndpointSlice, 1 Gateway, 1 GatewayClass, 1 HTTPRoute, 1 Service; "
        "errors: 0, warnings: 0\n",
        "",
    )


def test_validate_names_file_document_object_field_and_rule(manifests):
    (manifests / "broken.yaml").write_text(f"# first\n---\n{BROKEN}")
    (manifests / "text.yaml").write_text("a: b: c")
    code, text, _ = weft("validate", manifests)
    assert code == 1
    lines = text.splitlines()
    assert lines[0].startswith(
        f"error: {manifests}/broken.yaml document 1: Service/default/b: "
        "spec.ports[0].x: unknown field: "
    )
    assert lines[1].startswith(f"error: {manifests}/text.yaml: not YAML at line 1, column 5: ")
    assert lines[2].endswith("errors: 2, warnings: 0")


def test_validate_warns_of_what_would_not_be_accepted(manifests):
    (manifests / "more.yaml").write_text(route("lost", gateway="nowhere"))
    (manifests / "typo.yaml").write_text(
        gateway(80, name="typo").split("---")[1].replace('"weft"', '"weeft"')
    )
    (manifests / "other.yaml").write_text("{apiVersion: x/v1, kind: Widget, metadata: {name: w}}")
    code, text, _ = weft("validate", manifests)
    assert code == 0
    assert "HTTPRoute/default/lost: Accepted: NoMatchingParent: " in text
    assert f"unsupported: {manifests}/other.yaml document 1: Widget/default/w: " in text
    assert "Gateway/default/typo: GatewayClass weeft does not exist, so nobody serves" in text
    assert text.endswith("errors: 0, warnings: 3\n")


MESH = """
apiVersion: v1
kind: Service
metadata: {name: s}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: p, annotations: {weft.dev/sockmap: 'no', weft.dev/mtls: strict}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, annotations: {weft.dev/client-headers: 'yes'}}
spec:
  parentRefs: [{group: '', kind: Service, name: s}]
  rules: [{backendRefs: [{name: s, port: 80}]}]
"""


def test_validate_with_and_without_a_mesh(tmp_path):
    (tmp_path / "mesh.yaml").write_text(MESH)
    code, text, _ = weft("validate", tmp_path, "--mesh-address=127.0.0.1")
    assert (code, text.count("warning:")) == (0, 4)
    assert "there is no authority on this node" in text
    assert "'strict', not 'STRICT' or 'PERMISSIVE' or 'DISABLE'; until that is mended" in text
    assert "'no', not 'enabled' or 'disabled'; until that is mended, sockmap is not used" in text
    assert "'yes', not 'true' or 'false'; until that is mended, the client is not told" in text
    _, text, _ = weft("validate", tmp_path)
    assert "Accepted: UnsupportedValue: parentRef to Service default/s: there is no mesh" in text
    code, _, said = weft("validate", tmp_path, "--mesh-address=::1", "--mesh-address=::2")
    assert (code, "one of each family at most" in said) == (2, True)


def test_validate_for_programs(manifests):
    (manifests / "broken.yaml").write_text(BROKEN)
    for name, load in (("json", json.loads), ("yaml", yaml.safe_load)):
        code, text, _ = weft("validate", manifests, "-o", name)
        assert code == 1
        answer = load(text)
        assert answer["objects"]["HTTPRoute"] == 1
        (problem,) = answer["problems"]
        assert problem["path"] == "spec.ports[0].x"
        assert problem["level"] == "error"


def test_explain_offline(manifests):
    more = json.loads(route("other", path="/x/y"))
    more["spec"]["rules"][0]["matches"][0]["method"] = "POST"
    (manifests / "more.yaml").write_text(json.dumps(more))
    code, text, _ = weft("explain", "GET", "http://h:8080/x/y", "--manifests", manifests)
    assert code == 0
    assert text.splitlines() == [
        "gateway:  default/gw",
        "listener: Gateway/default/gw/http",
        "route:    HTTPRoute/default/r",
        "rule:     spec.rules[0], matches[0]",
        "backend:  Service/default/s/80 (100%): 127.0.0.1:9000",
        "",
        "not chosen:",
        "  HTTPRoute/default/other rule 0 on Gateway/default/gw/http: method is GET, not POST",
    ]
    code, text, _ = weft("explain", "GET", "http://h:8080/", "--manifests", manifests)
    assert code == 1
    assert "answer:   404: no route matches" in text
    code, text, _ = weft(
        "explain", "POST", "http://h:8080/x/y", "--manifests", manifests, "-o", "json"
    )
    assert code == 0
    assert json.loads(text)["route"] == "HTTPRoute/default/other"


def test_explain_from_a_pod_offline(tmp_path):
    (tmp_path / "mesh.yaml").write_text(
        MESH.replace("metadata: {name: p,", "status: {podIP: 10.0.0.1}\nmetadata: {name: p,")
    )
    ask = ("explain", "GET", "http://s/x", "--manifests", tmp_path)
    code, text, _ = weft(*ask, "--from", "default/p")
    assert text.splitlines() == [
        "service:  default/s:80",
        "way:      producer routes, of the Service's namespace",
        "kernel:   it could (HTTP in the kernel is off), between pods of one node",
        "listener: Service/default/s/80",
        "route:    HTTPRoute/default/r",
        "rule:     spec.rules[0], matches[0]",
        "backend:  Service/default/s/80 (100%): 503: no ready endpoints",
    ]
    assert code == 1
    code, text, _ = weft(*ask, "--from", "q")
    assert (code, text) == (1, "answer:   none: there is no pod default/q with an address\n")
    code, _, said = weft(*ask, "--from", "a/b/c")
    assert (code, said) == (2, "weft: 'a/b/c': not a pod; write NAMESPACE/NAME\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "GET", "ftp://x"), "weft: ftp://x: not a URL like http://host/path"),
        (("explain", "GET", "http://x", "-H", "bad"), "weft: -H 'bad': not 'name: value'"),
        (("get", "jobs"), "weft: there is no kind 'jobs' in Weft: it has backendtlspolicies, "),
        (("up", "--manifests", "/", "--admin", "x"), "weft: --admin x: not ADDRESS:PORT"),
        (
            ("up", "--manifests", "/", "--address-pool", "10.0.0.1/8"),
            "weft: --address-pool 10.0.0.1/8: 10.0.0.1/8 has host bits set",
        ),
        (
            ("up", "--manifests", "/", "--cni-bin-dir", "/"),
            "weft: --cni-bin-dir and --cni-conf-dir go together, and with --steer",
        ),
        (
            ("up", "--manifests", "/", "--steer-pods", "/", "--steer", "/"),
            "weft: --steer-pods stands in the place of --steer",
        ),
        (("validate", "/nowhere"), "Directory '/nowhere' does not exist"),
        (("up",), "nothing says where objects come from"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
)
def test_wrong_usage(arguments, message):
    code, text, errors = weft(*arguments)
    assert code == 2
    assert text == ""
    assert message in errors


@pytest.mark.parametrize(
    "arguments", [("status",), ("get", "gateways"), ("explain", "GET", "http://h/")]
)
def test_without_a_gateway(tmp_path, arguments):
    code, text, errors = weft(*arguments, "--run-dir", tmp_path)
    assert code == 3
    assert text == ""
    assert errors == (
        f"weft: no gateway runs in {tmp_path}: start one with 'weft up --manifests DIR', or name "
        "its directory with --run-dir\n"
    )


def test_while_the_agent_does_not_answer(tmp_path):
    lock = RunDir(tmp_path).lock({})
    try:
        code, text, errors = weft("status", "--run-dir", tmp_path)
    finally:
        os.close(lock)
    assert (code, text) == (1, "")
    assert f"(pid {os.getpid()}) runs, but its agent does not answer" in errors


def test_version():
    assert weft("version")[:2] == (0, "weft 0.1.0\n")
    assert json.loads(weft("version", "-o", "json")[1]) == {"version": "0.1.0"}


def test_help_of_every_command_tells_its_exit_codes():
    for name in cli.commands:
        code, text, _ = weft(name, "--help")
        assert code == 0
        assert "Exit codes:" in text or name == "version"


# --- with a gateway ------------------------------------------------------------------------------


def test_get_and_status(tmp_path, manifests):
    port = free_port()
    (manifests / "gateway.yaml").write_text(gateway(port))
    (manifests / "namespaced.yaml").write_text(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: c, namespace: other}, data: {a: b}}"
    )
    run_dir = tmp_path / "run"
    at = ("--run-dir", run_dir)
    with running(run_dir, f"--manifests={manifests}", "--workers=1", "--admin=off") as instance:
        instance.await_status(lambda status: status["ready"] and not status["degraded"])
        code, text, _ = weft("get", "gtw", *at)
        assert code == 0
        assert [line.split() for line in text.splitlines()] == [
            ["NAME", "CLASS", "ADDRESS", "ACCEPTED", "PROGRAMMED"],
            ["gw", "weft", mock.ANY, "True", "True"],
        ]
        # What it shows is where it is reached.
        socket.create_connection((text.split()[7], port), WAIT_S).close()
        code, text, _ = weft("get", "httproutes.gateway.networking.k8s.io", "-o", "wide", *at)
        assert text.splitlines() == [
            "NAME   HOSTNAMES   ACCEPTED   RESOLVEDREFS   PARENTS   REASONS",
            "r      <none>      True       True           gw        <none>",
        ]
        route_yaml = yaml.safe_load(weft("get", "HTTPRoute", "r", "-o", "yaml", *at)[1])
        assert route_yaml["status"]["parents"][0]["conditions"][0]["type"] == "Accepted"
        assert len(json.loads(weft("get", "svc", "-o", "json", *at)[1])["items"]) == 1
        assert weft("get", "cm", *at) == (
            0,
            "",
            "no configmaps in default; -A looks in all namespaces\n",
        )
        assert weft("get", "cm", "-A", *at)[1].splitlines()[1] == "other       c      1"
        assert weft("get", "cm", "c", "-n", "other", *at)[0] == 0
        code, text, errors = weft("get", "httproute", "none", *at)
        assert (code, text) == (1, "")
        assert errors.startswith("weft: there is no HTTPRoute none in default")
        for info in KINDS.values():
            assert weft("get", info.plural, "-A", "-o", "wide", *at)[0] == 0

        assert weft("get", "problems", *at) == (0, "", "no problems in the manifests\n")
        code, text, _ = weft("status", *at)
        assert code == 0
        assert "ready:      yes\n" in text
        assert f"manifests:  {manifests}\n" in text
        assert text.splitlines()[-1].split() == ["0.0.0.0", str(port), "yes"]
        assert json.loads(weft("status", "-o", "json", *at)[1])["ready"] is True
        code, text, _ = weft("explain", "GET", "http://h/x", "--address", "192.0.2.1", *at)
        assert (code, text) == (
            1,
            "answer:   none: nothing listens on 192.0.2.1 port 80 for http; "
            f"there is http on 0.0.0.0 port {port}\n",
        )

        (manifests / "routes.yaml").write_text(route("r", path="/x"))
        instance.await_status(lambda status: status["problems"] == {"warning": 1})
        code, text, _ = weft("status", *at)
        assert code == 0
        assert "problems:   1 warning; see 'weft get problems'\n" in text
        assert weft("get", "problems", *at)[1] == (
            f"warning: {manifests}/routes.yaml document 1: HTTPRoute/default/r: "
            "ResolvedRefs: BackendNotFound: Service default/s does not exist\n"
        )
        (manifests / "routes.yaml").write_text(f"{route('r', path='/x')}\n---\n{service()}")
        instance.await_status(lambda status: not status["problems"])

        # What no status has a place for.
        labels = "{weft.dev/mesh: x}"
        (manifests / "namespace.yaml").write_text(
            f"{{apiVersion: v1, kind: Namespace, metadata: {{name: a, labels: {labels}}}}}"
        )
        instance.await_status(lambda status: status["problems"] == {"warning": 1})
        assert weft("get", "problems", *at)[1] == (
            f"warning: {manifests}/namespace.yaml document 1: Namespace/a: label weft.dev/mesh is"
            " 'x', not 'enabled' or 'disabled'; until that is mended, it does not count\n"
        )
        (manifests / "namespace.yaml").unlink()
        instance.await_status(lambda status: not status["problems"])

        (manifests / "broken.yaml").write_text(BROKEN)
        instance.await_status(lambda status: status["problems"])
        code, text, _ = weft("status", *at)
        assert code == 1
        assert "problems:   1 error; see 'weft get problems'\n" in text
        assert (
            "Service/default/b: spec.ports[0].x: unknown field: " in weft("get", "problems", *at)[1]
        )
        assert len(yaml.safe_load(weft("get", "problems", "-o", "yaml", *at)[1])["items"]) == 1


def test_up_runs_until_it_is_told_to_stop(tmp_path, manifests):
    """The real command with the real workers, and a request through it to a port of nobody."""
    port = free_port()
    (manifests / "gateway.yaml").write_text(gateway(port))
    program = "from mesh.cli.main import main; main()"
    options = (f"--run-dir={tmp_path}/run", "--workers=1", "--admin=off", "--access-log=off")
    process = subprocess.Popen(
        [sys.executable, "-c", program, "up", f"--manifests={manifests}", *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    with process, alarm(process):
        lines = iter(process.stderr.readline, "")
        assert any("ready: configuration" in line for line in lines)
        assert weft("status", "--run-dir", tmp_path / "run")[0] == 0
        process.terminate()
        assert "weft: ended\n" in process.stderr.readlines()
    assert process.returncode == 0
    assert weft("status", "--run-dir", tmp_path / "run")[0] == 3


# --- output --------------------------------------------------------------------------------------


def test_tables_are_never_wrapped_or_coloured_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    long = "x" * 300
    output.table(["NAME", "VALUE"], [["a", long], ["[bold]b", "False"]])
    assert capsys.readouterr().out == (f"NAME      VALUE\na         {long}\n[bold]b   False\n")


def test_yaml_writes_what_appears_twice_twice(capsys):
    value = {"x": [1]}
    output.dump({"a": value, "b": value, "long": "y " * 200}, "yaml")
    text = capsys.readouterr().out
    assert "&" not in text
    assert yaml.safe_load(text) == {"a": value, "b": value, "long": "y " * 200}


def test_every_kind_has_its_columns():
    assert tables.COLUMNS.keys() == {info.kind for info in KINDS.values()}


def test_pods_are_shown_as_kubectl_does():
    pod = {
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {"nodeName": "n1"},
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "conditions": [{"type": "Ready", "status": "False"}],
        },
    }
    going = {"metadata": {"name": "q", "namespace": "shop", "deletionTimestamp": "t"}, "spec": {}}
    headers, lines = tables.rows("Pod", [pod, going], namespaces=True, wide=False)
    assert headers == ["NAMESPACE", "NAME", "READY", "STATUS", "IP", "NODE"]
    assert lines == [
        ["shop", "p", "False", "Running", "10.0.0.1,fd00::1", "n1"],
        ["shop", "q", "<none>", "Terminating", "<none>", "<none>"],
    ]


def test_the_worst_condition_is_shown():
    def parent(status):
        return {"conditions": [{"type": "Accepted", "status": status, "reason": "R"}]}

    for statuses, expected in (
        (["True", "False"], "False"),
        (["True", "Unknown"], "Unknown"),
        (["True"], "True"),
        ([], ""),
    ):
        item = {"status": {"parents": [parent(status) for status in statuses]}}
        assert tables.conditions(item, "Accepted") == expected


def test_what_does_not_hold_is_said_once():
    def condition(type, status, reason, message=""):
        return {"type": type, "status": status, "reason": reason, "message": message}

    assert unmet({"parents": [{"conditions": [condition("Accepted", "False", "R")]}]}) == (
        "Accepted: R"
    )
    assert unmet({"conditions": [condition("Accepted", "True", "Accepted", "well")]}) == ""
    listeners = [
        {
            "name": name,
            "conditions": [
                condition("Conflicted", conflicted, "HostnameConflict", f"{name} is taken"),
                condition("Programmed", "False", "Invalid", f"{name} is taken"),
            ],
        }
        for name, conflicted in (("a", "True"), ("b", "False"))
    ]
    gateway = [condition("Programmed", "False", "Invalid", "a is taken; b is taken")]
    assert unmet({"listeners": listeners, "conditions": gateway}) == (
        "listener a: Conflicted: HostnameConflict: a is taken; "
        "listener b: Programmed: Invalid: b is taken"
    )
