"""`weft observe` as people run it: what it prints, how it follows, how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import msgspec
import pytest
from flow_cases import PODS, TIME, connection, request

from mesh.agent.flow_peers import Peers
from mesh.agent.flows import Lost
from mesh.cli import flow_lines
from mesh.cli.client import CliError, ask_stream
from mesh.model.flow import Flow, HttpFlow, Peer
from tests.support.flow_worker import tell
from tests.support.running import PROJECT, alarm, free_port, gateway, running

WEFT = [sys.executable, "-c", "from mesh.cli.main import main; main()"]


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# --- lines ---------------------------------------------------------------------------------------


def known(flow):
    peers = Peers()
    peers.publish(PODS, ())
    return peers.complete(flow, "a")


@pytest.mark.parametrize(
    ("flow", "line"),
    [
        (
            request(),
            "shop/web-1:41234 -> shop/cart-1:8080 http-request FORWARDED "
            "(HTTP/1.1 GET http://cart/items) 200 3.2ms",
        ),
        (
            request(status=0, verdict="ERROR", reason="client-gone", source="203.0.113.9"),
            "203.0.113.9:41234 (world) -> shop/cart-1:8080 http-request ERROR "
            "(HTTP/1.1 GET http://cart/items) no-response 3.2ms client-gone",
        ),
        (
            request(status=404, verdict="ERROR", reason="no-route", to=""),
            "shop/web-1:41234 -> shop/cart:80 http-request ERROR "
            "(HTTP/1.1 GET http://cart/items) 404 3.2ms no-route",
        ),
        (
            connection(to="10.96.0.10", port=80, service="shop/cart:80", verdict="DROPPED"),
            "shop/web-1 -> shop/cart:80 tcp-connection DROPPED",
        ),
        (connection(), "shop/web-1 -> shop/cart-1:8080 tcp-connection FORWARDED"),
        (
            connection(source="", to="2001:db8::1", verdict="DROPPED", reason="NO_BACKENDS"),
            "unknown -> [2001:db8::1]:8080 (world) tcp-connection DROPPED NO_BACKENDS",
        ),
        (
            connection(reason="POLICY_AUDIT", policy="NetworkPolicy a/b ingress[0]"),
            "shop/web-1 -> shop/cart-1:8080 tcp-connection FORWARDED POLICY_AUDIT by NetworkPolicy"
            " a/b ingress[0]",
        ),
        (
            connection(source="::1", to="10.0.0.1", protocol="UDP", port=0),
            "::1 (host) -> 10.0.0.1 (world) udp-datagram FORWARDED",
        ),
        (
            request("/\x1b[2J\nx"),
            "shop/web-1:41234 -> shop/cart-1:8080 http-request FORWARDED "
            "(HTTP/1.1 GET http://cart/\\x1b[2J\\nx) 200 3.2ms",
        ),
    ],
)
def test_compact_lines(flow, line):
    assert flow_lines.compact(known(flow)) == f"Nov 25 15:00:01.123: {line}"


def test_wide_lines():
    flow = msgspec.structs.replace(request(), route="HTTPRoute/shop/cart", encryption="local")
    line = flow_lines.compact(known(flow), wide=True)
    assert line.startswith(flow_lines.compact(known(flow)) + " service=shop/cart:80 ")
    for part in (
        "route=HTTPRoute/shop/cart",
        "encryption=local",
        "node=a",
        "from-address=10.244.0.2",
        "from-labels=app=web",
        "to-labels=app=cart",
    ):
        assert f" {part}" in line


def test_json_is_the_record_with_a_readable_time():
    fields = json.loads(flow_lines.as_json(known(request(time=TIME + 7))))
    assert fields["time"] == "2025-11-25T15:00:01.123000007Z"
    assert fields["source"]["labels"] == {"app": "web"}
    assert fields["http"]["status"] == 200
    assert (fields["protocol"], fields["encryption"]) == ("TCP", "none")


def test_every_loss_has_words():
    for where in ("worker", "kernel", "undecodable", "follower"):
        assert flow_lines.lost_text(Lost(where, 12)).startswith("12 flow records ")
    assert "--flow-buffer" in flow_lines.lost_text(Lost("overwritten"))


def test_what_is_empty_is_shown_too():
    flow = Flow(TIME, "ERROR", Peer(), Peer(), http=HttpFlow("GET", "", "/", 400))
    assert flow_lines.compact(flow).endswith(
        "unknown -> unknown http-request ERROR (HTTP/1.1 GET http:///) 400 0.0ms"
    )


# --- the command ---------------------------------------------------------------------------------


class Node:
    """A Weft that runs in a directory, and the port at which its worker takes flows."""

    def __init__(self, directory):
        manifests = directory / "manifests"
        manifests.mkdir(parents=True)
        self.port = free_port()
        (manifests / "gateway.yaml").write_text(gateway(self.port))
        self.run_dir = directory / "run"
        self.running = running(
            self.run_dir,
            f"--manifests={manifests}",
            "--workers=1",
            "--admin=off",
            "--worker-module=tests.support.flow_worker",
            stub=False,
        )
        self.told = 0

    def __enter__(self):
        self.weft = self.running.__enter__()
        # Its port may have been taken by another connection for a moment: it is tried again.
        self.weft.await_status(lambda status: status["ready"] and not status["problems"])
        return self

    def __exit__(self, *error):
        return self.running.__exit__(*error)

    def tell(self, *flows, **more):
        """And wait until they have come."""
        assert tell(self.port, *flows, **more)
        self.told += len(flows)
        self.weft.await_status(lambda s: sum(s["flows"]["seen"].values()) == self.told)

    @property
    def agent(self):
        return self.weft.await_status(lambda status: status["ready"])["agent"]["pid"]


@pytest.fixture
def node(tmp_path):
    with Node(tmp_path) as node:
        yield node


def observe(*arguments):
    """Exit code, standard output's lines, standard error."""
    done = subprocess.run(
        [*WEFT, "observe", *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


class Following:
    """weft observe -f in a process of its own."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [*WEFT, "observe", "-f", *map(str, arguments)],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self):
        with alarm(self.process):
            return self.process.stdout.readline()

    def said(self):
        with alarm(self.process):
            return self.process.stderr.readline()

    def end(self, number=None):
        """Exit code and what else it said."""
        if number is not None:
            self.process.send_signal(number)
        with alarm(self.process):
            rest, errors = self.process.communicate()
        return self.process.returncode, rest, errors

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()


def test_the_newest_records(node):
    code, lines, said = observe("--run-dir", node.run_dir)
    assert (code, lines, said) == (0, [], "no flow records\n")
    node.tell(*(request(f"/{number}", time=TIME + number) for number in range(30)))
    code, lines, said = observe("--run-dir", node.run_dir)
    assert (code, said) == (0, "")
    assert [line.split("cart/")[1].split(")")[0] for line in lines] == list(map(str, range(10, 30)))
    code, lines, _ = observe("--run-dir", node.run_dir, "--last", 3, "-o", "json")
    assert [json.loads(line)["http"]["path"] for line in lines] == ["/27", "/28", "/29"]
    code, lines, _ = observe("--run-dir", node.run_dir, "--since", "2025-11-25T15:00:00Z")
    assert len(lines) == 30


def test_filters_reach_the_agent(node):
    node.tell(
        request("/a", 503, verdict="ERROR"),
        request("/b", 200, source="203.0.113.9"),
        connection(verdict="DROPPED", reason="NO_BACKENDS"),
    )
    for arguments, ends in (
        (("--http-status", "5xx"), ["503 3.2ms"]),
        (("--from", "203.0.113.0/24"), ["200 3.2ms"]),
        (("--verdict", "DROPPED"), ["DROPPED NO_BACKENDS"]),
        (
            ("--http-path", "/a", "--http-path", "/b", "--http-method", "get"),
            ["503 3.2ms", "200 3.2ms"],
        ),
        (("--service", "cart", "--to", "10.244.0.3", "--http-status", "200"), ["200 3.2ms"]),
    ):
        code, lines, said = observe("--run-dir", node.run_dir, *arguments)
        assert (code, said) == (0, "")
        assert len(lines) == len(ends)
        assert all(line.endswith(end) for line, end in zip(lines, ends, strict=True))
    for arguments in (("--http-status", "ok"), ("--since", "noon"), ("--from", "a/b/c")):
        for more in ((), ("-f",)):
            code, lines, said = observe("--run-dir", node.run_dir, *arguments, *more)
            assert (code, lines) == (2, [])
            assert arguments[1] in said


def test_nobody_runs(tmp_path):
    for more in ((), ("-f",)):
        code, lines, said = observe("--run-dir", tmp_path, *more)
        assert (code, lines) == (3, [])
        assert "no gateway runs" in said


def test_follow_shows_each_line_at_once_and_ends_with_ctrl_c(node):
    node.tell(request("/before"))
    with Following("--run-dir", node.run_dir, "--http-path", "/") as following:
        assert "/before)" in following.line()
        node.tell(connection(), request("/one"))
        assert "/one)" in following.line()
        node.tell(request("/two"), lost=4)
        assert "/two)" in following.line()
        assert following.said().startswith("weft: 4 flow records were lost")
        assert following.end(signal.SIGINT) == (0, "", "")


def test_follow_ends_when_its_reader_has_gone(node):
    with Following("--run-dir", node.run_dir, "-o", "json") as following:
        node.tell(request("/one"))
        assert json.loads(following.line())["http"]["path"] == "/one"
        following.process.stdout.close()
        node.tell(request("/two"))
        with alarm(following.process):
            assert following.process.wait() == 0
        assert following.process.stderr.read() == ""
        following.process.stdout = None


def test_follow_outlasts_the_agent(node):
    """Killed or not, the next one is followed, and nothing is shown twice."""
    node.tell(request("/before"))
    with Following("--run-dir", node.run_dir, "-o", "json") as following:
        assert "/before" in following.line()
        for turn, number in enumerate((signal.SIGKILL, signal.SIGTERM)):
            agent = node.agent
            os.kill(agent, number)
            assert "has ended: following the next one" in following.said()
            node.weft.await_status(lambda s, agent=agent: s["ready"] and s["agent"]["pid"] != agent)
            node.told = 0
            node.tell(request(f"/{turn}", time=time.time_ns()))
            assert json.loads(following.line())["http"]["path"] == f"/{turn}"
        assert node.weft.stop() == 0
        code, rest, said = following.end()
        assert (code, rest) == (3, "")
        assert said.splitlines()[-1] == f"weft: the gateway in {node.run_dir} has ended"


def test_several_nodes_are_one_stream(tmp_path):
    with Node(tmp_path / "a") as a, Node(tmp_path / "b") as b:
        dirs = ("--run-dir", a.run_dir, "--run-dir", b.run_dir)
        a.tell(*(request(f"/a{number}", time=TIME + number * 10) for number in range(5)))
        b.tell(*(request(f"/b{number}", time=TIME + number * 10 + 5) for number in range(5)))
        code, lines, _ = observe(*dirs, "--last", 4, "-o", "json")
        assert code == 0
        assert [json.loads(line)["http"]["path"] for line in lines] == ["/a3", "/b3", "/a4", "/b4"]
        with Following(*dirs, "--last", 1, "-o", "json") as following:

            def paths(count):
                return {json.loads(following.line())["http"]["path"] for _ in range(count)}

            assert paths(2) == {"/a4", "/b4"}
            for node in (b, a):
                node.tell(request("/from-a" if node is a else "/from-b"))
            assert paths(2) == {"/from-a", "/from-b"}
            assert a.weft.stop() == 0
            assert "the agent in" in following.said()
            assert following.said() == f"weft: the gateway in {a.run_dir} has ended\n"
            b.tell(request("/last"))
            assert paths(1) == {"/last"}
            assert following.end(signal.SIGINT) == (0, "", "")


def test_an_answer_that_breaks_off_is_an_error(tmp_path):
    """Not one that is shorter."""
    (tmp_path / "supervisor.lock").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "agent.sock"))
        server.listen()

        def answer():
            peer, _ = server.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        lines = ask_stream(tmp_path, "/flows")
        assert next(lines) is None
        assert next(lines) == b"{}"
        with pytest.raises(CliError):
            next(lines)
        thread.join()


def test_status_tells_of_flows(node):
    node.tell(request(), request(), connection(verdict="DROPPED"), lost=3)
    done = subprocess.run(
        [*WEFT, "status", "--run-dir", str(node.run_dir)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "flows:      2 FORWARDED, 1 DROPPED; lost: 3 worker\n" in done.stdout
    assert "datapath:" not in done.stdout
