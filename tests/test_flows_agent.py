"""Flow records from workers through a real agent to whoever asks for them on its socket."""

import http.client
import os
import signal
import socket

import msgspec
import pytest
from flow_cases import TIME, connection, request

from mesh.agent.flows import Line
from mesh.cli.client import UsageError, ask_stream
from tests.support.flow_worker import tell
from tests.support.running import free_port, gateway, running

WAIT_S = 20


@pytest.fixture
def port(tmp_path):
    """The port at which a worker takes flows, once Weft runs."""
    (tmp_path / "manifests").mkdir()
    port = free_port()
    (tmp_path / "manifests" / "gateway.yaml").write_text(gateway(port))
    return port


def started(tmp_path, *more):
    return running(
        tmp_path / "run",
        f"--manifests={tmp_path / 'manifests'}",
        "--workers=1",
        "--worker-module=tests.support.flow_worker",
        *more,
        stub=False,
    )


def ready(weft):
    return weft.await_status(lambda status: status["ready"])


def seen(weft, count):
    """All flows told so far have come."""
    return weft.await_status(lambda status: sum(status["flows"]["seen"].values()) == count)


def asked(weft, *query):
    lines = ask_stream(weft.run_dir.path, "/flows", query)
    return [decode(line) for line in lines if line is not None]


def decode(line):
    return msgspec.json.decode(line, type=Line)


def paths(lines):
    return [line.flow.http.path for line in lines if line.flow is not None]


class Reader:
    """Follows over a socket of its own, and reads when the test says so."""

    def __init__(self, weft, query=""):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(str(weft.run_dir.api_socket))
        self.sock.sendall(f"GET /flows?follow=1{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.response = http.client.HTTPResponse(self.sock)
        self.response.begin()
        assert self.response.status == 200

    def line(self):
        return decode(self.response.readline())

    def until(self, last):
        """Lines up to the flow with this path."""
        lines = [self.line()]
        while lines[-1].flow is None or lines[-1].flow.http.path != last:
            lines.append(self.line())
        return lines

    def close(self):
        self.response.close()
        self.sock.close()


def test_asked_for_and_followed(tmp_path, port):
    with started(tmp_path, "--admin=off") as weft:
        ready(weft)
        first = [request(f"/{number}", time=TIME + number) for number in range(10)]
        # Told out of their order, they are shown by time.
        tell(port, *first[5:], connection(time=TIME - 1))
        tell(port, *first[:5])
        seen(weft, 11)
        assert paths(asked(weft, ("http-path", "/"))) == [f"/{number}" for number in range(10)]
        assert len(asked(weft)) == 11
        # The last two that came, not those with the latest times.
        assert paths(asked(weft, ("last", "2"))) == ["/3", "/4"]
        assert asked(weft, ("last", "0")) == []
        assert paths(asked(weft, ("after", str(TIME + 7)))) == ["/8", "/9"]
        assert paths(asked(weft, ("since", "2025-11-25T15:00:01.123Z")))[0] == "/0"
        assert asked(weft, ("since", "5m")) == []

        reader = Reader(weft, "&last=1&http-method=POST")
        tell(port, request("/no"), request("/new", method="POST"))
        assert reader.line().flow.http.path == "/new"
        tell(port, request("/newer", method="POST"), lost=3)
        assert reader.line().flow.http.path == "/newer"
        lost = reader.line().lost
        assert (lost.where, lost.count) == ("worker", 3)
        assert ready(weft)["flows"]["lost"]["worker"] == 3
        reader.close()


def test_queries_that_cannot_be_understood_are_told(tmp_path, port):
    with started(tmp_path, "--admin=off") as weft:
        ready(weft)
        for query, said in (
            (("colour", "red"), "no filter colour"),
            (("since", "noon"), "since noon"),
            (("last", "-1"), "last -1"),
            (("last", "²"), "last ²"),
            (("http-status", "x"), "http-status x"),
        ):
            with pytest.raises(UsageError, match=said):
                asked(weft, query)


def test_memory_is_bounded_and_what_is_gone_is_said(tmp_path, port):
    with started(tmp_path, "--admin=off", "--flow-buffer=50") as weft:
        ready(weft)
        for start in range(0, 1000, 100):
            tell(port, *(request(f"/{start + n}", time=TIME + start + n) for n in range(100)))
        status = seen(weft, 1000)
        assert status["flows"]["overwritten"] == 950
        assert paths(asked(weft)) == [f"/{number}" for number in range(950, 1000)]
        first, *rest = asked(weft, ("since", "2025-11-25T15:00:00Z"))
        assert first.lost.where == "overwritten"
        assert len(rest) == 50
        assert asked(weft, ("since", "2025-11-25T15:00:00Z"), ("last", "1"))[0].flow is not None


def test_a_reader_that_stops_loses_records_and_holds_up_nobody(tmp_path, port):
    """Both read the same; one of them does not, for a while."""
    rounds, size = 30, 400
    with started(tmp_path, "--admin=off") as weft:
        ready(weft)
        slow, quick = Reader(weft), Reader(weft)
        for turn in range(rounds):
            tell(port, *(request(f"/{turn}/{n}") for n in range(size)))
            assert len(quick.until(f"/{turn}/{size - 1}")) == size
        total = rounds * size
        lost = seen(weft, total)["flows"]["lost"]["follower"]
        assert lost > 0
        lines = []
        while sum(line.lost.count for line in lines if line.lost is not None) < lost:
            lines.append(slow.line())
        tell(port, request("/end"))
        lines += slow.until("/end")
        gaps = [line.lost for line in lines if line.lost is not None]
        assert sum(gap.count for gap in gaps) == lost
        assert {gap.where for gap in gaps} == {"follower"}
        assert len(paths(lines)) == total + 1 - lost
        assert paths(lines)[:3] == ["/0/0", "/0/1", "/0/2"]
        slow.close()
        quick.close()


def test_readers_that_leave_are_forgotten(tmp_path, port):
    with started(tmp_path, "--admin=off") as weft:
        ready(weft)
        for _ in range(20):
            Reader(weft).close()
        stays = Reader(weft)
        for turn in range(20):
            tell(port, *(request(f"/{turn}/{n}") for n in range(400)))
            stays.until(f"/{turn}/399")
        # Nobody was there any more to lose records.
        assert seen(weft, 8000)["flows"]["lost"]["follower"] == 0
        stays.close()


def test_a_stop_ends_readers_at_once(tmp_path, port):
    """Whether they read or not."""
    with started(tmp_path, "--admin=off") as weft:
        agent = ready(weft)["agent"]["pid"]
        waits, stuck = Reader(weft), Reader(weft)
        for turn in range(20):
            tell(port, *(request(f"/{turn}/{n}") for n in range(400)))
            waits.until(f"/{turn}/399")
        os.kill(agent, signal.SIGTERM)
        assert waits.response.readline() == b""
        waits.close()
        stuck.close()
        weft.await_line("agent (pid")
        weft.await_status(lambda status: status["agent"]["pid"] != agent)


def test_metrics(tmp_path, port):
    admin = free_port()
    with started(tmp_path, f"--admin=127.0.0.1:{admin}") as weft:
        ready(weft)
        tell(port, request(), connection(verdict="DROPPED", reason="NO_BACKENDS"), lost=7)
        status = seen(weft, 2)
        assert status["datapath"] is None
        connection_ = http.client.HTTPConnection("127.0.0.1", admin, timeout=WAIT_S)
        connection_.request("GET", "/metrics")
        text = connection_.getresponse().read().decode()
        connection_.close()
        lines = text.splitlines()
        assert 'weft_flows_total{verdict="FORWARDED"} 1.0' in lines
        assert 'weft_flows_total{verdict="DROPPED"} 1.0' in lines
        assert 'weft_flows_total{verdict="ERROR"} 0.0' in lines
        assert 'weft_flows_lost_total{where="worker"} 7.0' in lines
        assert 'weft_flows_lost_total{where="follower"} 0.0' in lines
        assert "weft_datapath" not in text
