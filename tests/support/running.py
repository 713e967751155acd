"""A supervisor with its agent and workers as real processes, and what tests ask of them."""

import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import trustme

from mesh.agent.rundir import RunDir
from mesh.cli.client import CliError, ask

PROJECT = Path(__file__).parent.parent.parent
# Generous: only a hang reaches it.
WAIT_S = 60


def free_port(address="127.0.0.1"):
    """A port that nobody had a moment ago, below those that the kernel gives to connections."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), socket.create_server((address, port)):
            return port


class Running:
    """`said` is what the supervisor and its children have said so far."""

    def __init__(self, run_dir, *arguments, env=None, stub=True, through=()):
        self.run_dir = RunDir(run_dir)
        worker = ["--worker-module=tests.support.stub_worker"] if stub else []
        command = [*through, sys.executable, "-m", "mesh.agent.supervisor"]
        command += [f"--run-dir={run_dir}"]
        self.process = subprocess.Popen(
            [*command, *worker, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **(env or {})},
        )
        self.said = []
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        """All the time: a process whose words nobody reads would wait for ever."""
        with self.process.stderr as stream:
            for line in stream:
                self.said.append(line)
                self._lines.put(line)
        self._lines.put(None)

    def await_line(self, text):
        """The next line that contains `text`."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get(timeout=WAIT_S)) is not None:
                if text in line:
                    return line
        raise AssertionError(f"{text!r} was not said, but:\n{''.join(self.said)}")

    def ask(self, path, **query):
        return ask(self.run_dir.path, path, query.items())

    def await_status(self, holds):
        """Ask for the status until it holds; the agent may be between two lives."""
        deadline = time.monotonic() + WAIT_S
        status = None
        while time.monotonic() < deadline:
            with contextlib.suppress(CliError):
                status = self.ask("/status")
                if holds(status):
                    return status
            if self.process.poll() is not None:
                break
            os.sched_yield()
        said = "".join(self.said)
        raise AssertionError(f"never: {json.dumps(status, indent=1)}\nwhat it said:\n{said}")

    def stop(self, number=signal.SIGTERM):
        """The exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        with alarm(self.process):
            code = self.process.wait()
        self._reader.join()
        return code


@contextlib.contextmanager
def alarm(process):
    """Kill a process that does not get on, so that reading from it ends."""

    timer = threading.Timer(WAIT_S, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextlib.contextmanager
def running(run_dir, *arguments, **options):
    instance = Running(run_dir, *arguments, **options)
    try:
        yield instance
    finally:
        if instance.process.returncode is None:
            instance.stop()


def gateway(port, name="gw", **listener):
    """A GatewayClass, and a Gateway with one HTTP listener."""
    listeners = [{"name": "http", "protocol": "HTTP", "port": port, **listener}]
    return "\n---\n".join(
        (
            json.dumps(
                {
                    "apiVersion": "gateway.networking.k8s.io/v1",
                    "kind": "GatewayClass",
                    "metadata": {"name": "weft"},
                    "spec": {"controllerName": "weft.dev/gateway-controller"},
                }
            ),
            json.dumps(
                {
                    "apiVersion": "gateway.networking.k8s.io/v1",
                    "kind": "Gateway",
                    "metadata": {"name": name},
                    "spec": {"gatewayClassName": "weft", "listeners": listeners},
                }
            ),
        )
    )


def route(name, gateway="gw", path="/", service="s"):
    return json.dumps(
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": name},
            "spec": {
                "parentRefs": [{"name": gateway}],
                "rules": [
                    {
                        "matches": [{"path": {"type": "PathPrefix", "value": path}}],
                        "backendRefs": [{"name": service, "port": 80}],
                    }
                ],
            },
        }
    )


def service(name="s", port=80, target=9000):
    """A Service and its EndpointSlice."""
    return "\n---\n".join(
        (
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "metadata": {"name": name},
                    "spec": {"ports": [{"port": port}]},
                }
            ),
            json.dumps(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": name,
                        "labels": {"kubernetes.io/service-name": name},
                    },
                    "addressType": "IPv4",
                    "endpoints": [{"addresses": ["127.0.0.1"]}],
                    "ports": [{"port": target}],
                }
            ),
        )
    )


def stub_answer(port):
    """What a stub worker says: its pid and the names of its routes."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as connection:
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    pid, *routes = data.decode().split()
    return int(pid), {name.rpartition("/")[2] for name in routes}


def tls_secret(name, *hosts):
    """A Secret of type kubernetes.io/tls for these hosts, and its key in PEM."""
    authority = trustme.CA()
    issued = authority.issue_cert(*hosts)
    key = issued.private_key_pem.bytes().decode()
    chain = "".join(blob.bytes().decode() for blob in issued.cert_chain_pems)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "type": "kubernetes.io/tls",
        "stringData": {"tls.crt": chain, "tls.key": key},
    }
    return json.dumps(secret), key
