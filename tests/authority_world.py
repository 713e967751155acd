"""An authority as a real process, and asking it as agents do."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT_S = 20
DOMAIN = "cluster.local"


def pod(name: str, node: str, account: str, phase: str = "Running", namespace: str = "shop") -> str:
    number = sum(map(ord, name)) % 250
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"nodeName": node, "serviceAccountName": account, "containers": []},
            "status": {
                "phase": phase,
                "podIP": f"10.0.0.{number}",
                "podIPs": [{"ip": f"10.0.0.{number}"}],
            },
        }
    )


def spiffe(account: str, namespace: str = "shop", domain: str = DOMAIN) -> str:
    return f"spiffe://{domain}/ns/{namespace}/sa/{account}"


GATEWAY = spiffe("weft-gateway", "weft-system")


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("authority", timeout=WAIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(str(self._path))


def ask(path: Path, method: str, what: str, body: bytes | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    with contextlib.closing(Connection(path)) as connection:
        connection.request(method, what, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


class AuthorityProcess:
    """`weft authority` in a directory below `directory`; manifests lie beside it."""

    def __init__(self, directory: Path, *more: str) -> None:
        self.manifests = directory / "manifests"
        self.manifests.mkdir(exist_ok=True)
        self.directory = directory / "authority"
        self.nodes = {name: directory / f"{name}.sock" for name in ("a", "b")}
        self.arguments = [
            f"--dir={self.directory}",
            f"--manifests={self.manifests}",
            *(f"--node={name}={path}" for name, path in self.nodes.items()),
            *more,
        ]
        self.said: list[str] = []

    def start(self, *more: str) -> None:
        """Returns once it answers."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mesh.authority.main", *self.arguments, *more],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.await_line("answers for ")

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.said.append(line)
                self._lines.put(line)
        self._lines.put(None)

    def await_line(self, text: str) -> str:
        """The next line with this text."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get(timeout=WAIT_S)) is not None:
                if text in line:
                    return line
        raise AssertionError(f"{text!r} was not said, but:\n{''.join(self.said)}")

    def end(self, *, kill: bool = False) -> int:
        if self.process.poll() is None:
            self.process.kill() if kill else self.process.terminate()
        code = self.process.wait(WAIT_S)
        self._reader.join()
        return code

    def write(self, name: str, *pods: str) -> None:
        new = self.manifests / f".{name}.new"
        new.write_text("\n---\n".join(pods))
        new.replace(self.manifests / f"{name}.yaml")

    def sign(self, node: str, *requests: str) -> list[dict[str, str]]:
        """The answers to requests from a node."""
        body = json.dumps({"requests": requests}).encode()
        status, answer = ask(self.nodes[node], "POST", "/v1/svids", body)
        assert status == 200, answer
        return list(answer["answers"])

    def bundle(self, node: str, have: str = "") -> dict[str, Any]:
        status, answer = ask(self.nodes[node], "GET", f"/v1/bundle?have={have}")
        assert status == 200, answer
        return dict(answer)

    def admin(self, method: str, what: str) -> tuple[int, Any]:
        return ask(self.directory / "admin.sock", method, what)

    def state(self) -> dict[str, Any]:
        status, answer = self.admin("GET", "/v1/state")
        assert status == 200
        return dict(answer)

    def refused(self) -> dict[tuple[str, str], int]:
        return {(one["node"], one["reason"]): one["count"] for one in self.state()["refused"]}


@contextlib.contextmanager
def authority_in(directory: Path, *more: str) -> Iterator[AuthorityProcess]:
    """Not started yet; ended afterwards."""
    process = AuthorityProcess(directory, *more)
    try:
        yield process
    finally:
        if hasattr(process, "process"):
            process.end()


def until(condition: Any) -> Any:
    """What a condition yields once it is true."""
    deadline = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
    return found
