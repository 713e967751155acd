"""The supervisor with real children: ports, restarts, draining, the run directory."""

import errno
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh.agent.child import MAX_PAUSE_S, restart_pause
from mesh.agent.ports import BindError, bind, holder, reached_at
from mesh.agent.rundir import KEPT_DEAD, RunDir, RunDirError
from mesh.model.channel import PortAddress
from tests.support.running import PROJECT, free_port, gateway, route, running, stub_answer

ADMIN = "--admin=off"


@pytest.fixture
def manifests(tmp_path):
    path = tmp_path / "manifests"
    path.mkdir()
    return path


@pytest.fixture
def port(manifests):
    number = free_port()
    (manifests / "gateway.yaml").write_text(gateway(number))
    (manifests / "route.yaml").write_text(route("r"))
    return number


def arguments(manifests, workers=1):
    return f"--manifests={manifests}", f"--workers={workers}", ADMIN


def is_healthy(status):
    version = status["config"]["version"]
    current = all(worker["version"] == version for worker in status["workers"])
    return status["ready"] and not status["degraded"] and current


def worker_pids(status):
    return {worker["pid"] for worker in status["workers"]}


def await_end(pid):
    """Wait for the end of a process that is nobody's child here."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([pidfd], [], [], 20)
        assert ready, f"process {pid} is still there"
    finally:
        os.close(pidfd)


def test_serves_and_stops(tmp_path, manifests, port):
    with running(tmp_path / "run", *arguments(manifests, workers=2)) as weft:
        status = weft.await_status(is_healthy)
        assert len(status["workers"]) == 2
        assert status["ports"] == [{"address": "0.0.0.0", "port": port, "bound": True, "why": ""}]
        pid, routes = stub_answer(port)
        assert pid in worker_pids(status)
        assert routes == {"r"}
        assert weft.stop() == 0
    for pid in (*worker_pids(status), status["agent"]["pid"]):
        await_end(pid)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_kill_9_of_the_agent_leaves_ports_and_workers_alone(tmp_path, manifests, port):
    with running(tmp_path / "run", *arguments(manifests)) as weft:
        before = weft.await_status(is_healthy)
        os.kill(before["agent"]["pid"], signal.SIGKILL)
        await_end(before["agent"]["pid"])
        assert stub_answer(port) == (before["workers"][0]["pid"], {"r"})
        (manifests / "route2.yaml").write_text(route("r2"))
        after = weft.await_status(
            lambda status: is_healthy(status) and status["agent"] != before["agent"]
        )
        assert worker_pids(after) == worker_pids(before)
        while stub_answer(port)[1] != {"r", "r2"}:
            os.sched_yield()
        assert weft.stop() == 0
    assert "no longer listening" not in "".join(weft.said)


def test_kill_9_of_a_worker_costs_only_that_worker(tmp_path, manifests, port):
    with running(tmp_path / "run", *arguments(manifests, workers=2)) as weft:
        before = weft.await_status(is_healthy)
        victim, survivor = (worker["pid"] for worker in before["workers"])
        os.kill(victim, signal.SIGKILL)
        weft.await_line(f"(pid {victim}) ended by signal SIGKILL: starting it again now")
        after = weft.await_status(
            lambda status: (
                is_healthy(status)
                and len(status["workers"]) == 2
                and victim not in worker_pids(status)
            )
        )
        assert survivor in worker_pids(after)
        assert after["agent"] == before["agent"]
        (new,) = worker_pids(after) - {survivor}
        os.kill(survivor, signal.SIGSTOP)
        try:
            # The new one has the port and the whole configuration.
            assert stub_answer(port) == (new, {"r"})
        finally:
            os.kill(survivor, signal.SIGCONT)


def test_kill_9_of_the_supervisor_ends_everything(tmp_path, manifests, port):
    with running(tmp_path / "run", *arguments(manifests, workers=2)) as weft:
        status = weft.await_status(is_healthy)
        weft.stop(signal.SIGKILL)
        for pid in (*worker_pids(status), status["agent"]["pid"]):
            await_end(pid)
    with running(tmp_path / "run", *arguments(manifests)) as weft:
        weft.await_status(is_healthy)
        assert stub_answer(port)[1] == {"r"}


def test_a_second_gateway_in_a_run_directory_is_refused(tmp_path, manifests, port):
    with running(tmp_path / "run", *arguments(manifests)) as weft:
        weft.await_status(is_healthy)
        command = [sys.executable, "-m", "mesh.agent.supervisor", f"--run-dir={tmp_path}/run"]
        second = subprocess.run(
            [*command, *arguments(manifests)], cwd=PROJECT, capture_output=True, text=True
        )
        assert second.returncode == 1
        assert f"a gateway already runs in {tmp_path}/run (pid {weft.process.pid})" in second.stderr
        assert "stop it" in second.stderr
        weft.await_status(is_healthy)


def test_a_port_that_is_taken_is_named_retried_and_taken_over(tmp_path, manifests, port):
    with (
        socket.create_server(("127.0.0.1", port)) as taken,
        running(tmp_path / "run", *arguments(manifests)) as weft,
    ):
        status = weft.await_status(lambda status: status["degraded"] and status["ready"])
        (entry,) = status["ports"]
        assert not entry["bound"]
        assert f"port {port} is in use by" in entry["why"]
        assert f"(pid {os.getpid()})" in entry["why"]
        (item,) = weft.ask("/objects", kind="Gateway")["items"]
        programmed = {c["type"]: c for c in item["status"]["conditions"]}["Programmed"]
        assert programmed["status"] == "False"
        taken.close()
        weft.await_status(is_healthy)
        assert stub_answer(port)[1] == {"r"}
        (item,) = weft.ask("/objects", kind="Gateway")["items"]
        programmed = {c["type"]: c for c in item["status"]["conditions"]}["Programmed"]
        assert programmed["status"] == "True"


def test_ports_follow_the_gateways(tmp_path, manifests, port):
    other = free_port()
    with running(tmp_path / "run", *arguments(manifests)) as weft:
        weft.await_status(is_healthy)
        (manifests / "gateway.yaml").write_text(gateway(other))
        weft.await_status(lambda s: is_healthy(s) and [p["port"] for p in s["ports"]] == [other])
        assert stub_answer(other)[1] == {"r"}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_a_worker_that_cannot_start_is_tried_again_with_pauses(tmp_path, manifests, port):
    options = ("--worker-module=tests.support.no_such_module", ADMIN, "--workers=1")
    with running(tmp_path / "run", f"--manifests={manifests}", *options) as weft:
        for pause in ("now", "0.1 s", "0.2 s"):
            weft.await_line(
                f"ended by exit code 1: starting it again {pause}".replace("0.", "in 0.")
            )
        weft.await_status(lambda status: status["notReady"] == ["no worker is connected"])


def test_the_second_signal_ends_at_once(tmp_path, manifests, port):
    """A stopped worker does not drain."""
    with running(tmp_path / "run", *arguments(manifests), "--drain-timeout=3600") as weft:
        status = weft.await_status(is_healthy)
        (pid,) = worker_pids(status)
        os.kill(pid, signal.SIGSTOP)
        weft.process.send_signal(signal.SIGINT)
        weft.await_line("draining")
        assert weft.stop(signal.SIGINT) == 1
        await_end(pid)


def test_an_agent_that_starts_while_the_node_leaves_says_so_too(tmp_path, manifests, port):
    with running(tmp_path / "run", *arguments(manifests), "--drain-delay=3600") as weft:
        before = weft.await_status(is_healthy)
        weft.process.send_signal(signal.SIGTERM)
        weft.await_line("going to close")
        assert weft.ask("/status")["notReady"] == ["it is being shut down"]
        os.kill(before["agent"]["pid"], signal.SIGKILL)
        weft.await_status(
            lambda status: (
                status["agent"] != before["agent"] and "it is being shut down" in status["notReady"]
            )
        )
        assert stub_answer(port)[1] == {"r"}
        weft.stop()


def test_restart_pauses():
    pauses = [restart_pause(failures) for failures in range(1, 12)]
    assert pauses[:4] == [0.0, 0.1, 0.2, 0.4]
    assert pauses == sorted(pauses)
    assert pauses[-1] == restart_pause(10_000) == MAX_PAUSE_S


# --- ports and run directory ---------------------------------------------------------------------


def test_a_wildcard_takes_both_families():
    number = free_port()
    with bind(PortAddress("::", number)) as sock:
        sock.setblocking(True)
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, number)):
                sock.accept()[0].close()
        with pytest.raises(BindError, match="by this gateway itself, for another address"):
            bind(PortAddress("127.0.0.1", number))
    assert holder(number) is None


def test_where_a_listener_is_reached():
    assert reached_at("192.0.2.9") == ("192.0.2.9",)
    assert reached_at("::1") == ("::1",)
    for wildcard in ("0.0.0.0", "::"):
        number = free_port()
        with bind(PortAddress(wildcard, number)):
            for address in reached_at(wildcard):
                socket.create_connection((address, number)).close()


def test_a_host_that_reaches_nobody_is_reached_by_itself():
    code = "from mesh.agent.ports import *; print(reached_at('0.0.0.0'), reached_at('::'))"
    alone = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*alone, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no network namespace can be made here: run as root")
    result = subprocess.run(
        [*alone, sys.executable, "-c", code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "('127.0.0.1',) ('127.0.0.1',)\n"


def test_an_address_that_is_not_ours():
    with pytest.raises(BindError, match=r"192\.0\.2\.1 is not an address of this host: add it"):
        bind(PortAddress("192.0.2.1", 80))


def test_a_port_that_needs_privileges(tmp_path):
    code = (
        "from mesh.agent.ports import *\n"
        "try: bind(PortAddress('127.0.0.1', 1))\n"
        "except BindError as error: print(error)"
    )
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        pytest.skip("every port is unprivileged here (net.ipv4.ip_unprivileged_port_start)")
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        user="nobody" if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("no permission for port 1: run as root, or grant")


def test_the_run_directory_is_locked_by_its_process(tmp_path):
    run_dir = RunDir(tmp_path / "a/b")
    assert run_dir.holder() is None
    lock = run_dir.lock({"x": 1})
    try:
        assert run_dir.holder() == {"pid": os.getpid(), "x": 1}
        with pytest.raises(RunDirError, match=f"already runs in .* \\(pid {os.getpid()}\\)"):
            RunDir(tmp_path / "a/b").lock({})
    finally:
        os.close(lock)
    assert run_dir.holder() is None


def test_who_asks_for_the_holder_does_not_become_it(tmp_path):
    """`RunDir.holder` has a share of the lock for a moment, in which a gateway may start."""
    run_dir = RunDir(tmp_path)
    with ThreadPoolExecutor() as threads, open(run_dir.lock_file, "w") as asker:
        fcntl.flock(asker, fcntl.LOCK_SH)
        taken = threads.submit(run_dir.lock, {})
        with pytest.raises(TimeoutError):
            taken.result(timeout=0.1)
        asker.close()
        os.close(taken.result(timeout=20))


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match=os.strerror(errno.ENOTDIR) + ".*--run-dir"):
        RunDir(tmp_path / "file/run").lock({})


def test_a_dead_workers_gauges_go_and_its_counters_stay(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.freshen("nobody")
    for name in ("counter_7.db", "gauge_livesum_7.db", "gauge_livesum_77.db"):
        (run_dir.metrics / name).touch()
    run_dir.forget_worker(7)

    def left():
        return sorted(file.name for file in run_dir.metrics.iterdir())

    assert left() == ["counter_7.db", "gauge_livesum_77.db"]
    for pid in range(1000, 1000 + KEPT_DEAD):
        run_dir.forget_worker(pid)
    assert left() == ["gauge_livesum_77.db"]
