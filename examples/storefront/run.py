"""The storefront: starts its backends and the gateway, says what to try, shows what happens.

`make run` runs this. Ctrl-C (or SIGTERM) ends everything that it started. Exit codes: 0 ended as
asked, 1 something could not be started or went away.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from certs.selfsigned import Authority
from mesh.agent.rundir import RunDir, default_run_dir
from mesh.cli.client import CliError, ask

HERE = Path(__file__).resolve().parent
MANIFESTS = HERE / "manifests"
SECRET = MANIFESTS / "secret.generated.yaml"
CA = HERE / "ca.generated.pem"
HOST, HTTP, HTTPS = "shop.example.test", 8080, 8443
LOG = HERE.parents[1] / "build" / "storefront.log"
ADMIN = 15090
BACKENDS = {
    9101: "catalog-v1",
    9102: "catalog-v2",
    9103: "cart",
    9104: "cart",
    9105: "checkout",
    9106: "audit",
}
_START_S = 20.0
_RENEW = datetime.timedelta(days=7)


class CannotRun(Exception):
    """What is in the way, and what to do about it."""


# --- what has to be there first ------------------------------------------------------------------


def check_ports() -> None:
    """CannotRun: somebody else listens where the storefront has to."""
    for port in (HTTP, HTTPS, ADMIN, *BACKENDS):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError as error:
                why = "is in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
                raise CannotRun(
                    f"port {port} of 127.0.0.1 {why}: end what listens there (ss -ltnp "
                    f"'sport = :{port}' names it), then run this again"
                ) from None


def check_run_dir(run_dir: Path) -> None:
    """CannotRun: a storefront runs already."""
    holder = RunDir(run_dir).holder()
    if holder is not None:
        raise CannotRun(
            f"the storefront runs already (pid {holder.get('pid', 'unknown')}): end it first"
        )


def make_secret() -> None:
    """The listener's certificate, for as long as one is still good; its authority's certificate
    is for curl. Both files are generated, and git ignores them."""
    if SECRET.exists() and CA.exists() and not _expires_soon():
        return
    authority = Authority.create("storefront example")
    chain, key = authority.issue(dns=[HOST])
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": "shop-example-test", "namespace": "storefront"},
        "data": {
            "tls.crt": base64.b64encode(chain.encode()).decode(),
            "tls.key": base64.b64encode(key.encode()).decode(),
        },
    }
    CA.write_text(authority.certificate_pem)
    unfinished = SECRET.with_suffix(".tmp")
    unfinished.touch(mode=0o600)
    unfinished.write_text("# Made by run.py.\n" + yaml.safe_dump(secret))
    unfinished.rename(SECRET)


def _expires_soon() -> bool:
    chain = base64.b64decode(yaml.safe_load(SECRET.read_text())["data"]["tls.crt"])
    end = x509.load_pem_x509_certificate(chain).not_valid_after_utc
    return end - datetime.datetime.now(datetime.UTC) < _RENEW


# --- processes -----------------------------------------------------------------------------------


class Processes:
    """What was started, ended in reverse order."""

    def __init__(self) -> None:
        self._all: list[tuple[str, subprocess.Popen[str]]] = []

    def start(self, name: str, command: list[str], **more: Any) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C comes to this process alone, which ends the others in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, text=True, start_new_session=True, **more
        )
        self._all.append((name, process))
        return process

    def __bool__(self) -> bool:
        return bool(self._all)

    def ended(self) -> str | None:
        """The name of one that is not there any more."""
        return next((name for name, process in self._all if process.poll() is not None), None)

    def end(self) -> None:
        for _, process in reversed(self._all):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_backends(processes: Processes) -> None:
    """CannotRun: one of them does not come up."""
    started = [
        (
            name,
            processes.start(
                f"{name} (port {port})",
                [sys.executable, str(HERE / "backends.py"), name, str(port)],
                stdout=subprocess.PIPE,
            ),
        )
        for port, name in BACKENDS.items()
    ]
    for name, process in started:
        assert process.stdout is not None
        # The line comes when it listens; an end of file, when it ended.
        if not process.stdout.readline():
            raise CannotRun(f"the backend {name} did not start; its message is above")


def start_gateway(processes: Processes, run_dir: Path) -> None:
    """CannotRun: it is not ready in time. What it says goes to a file: the terminal is for the
    view."""
    LOG.parent.mkdir(exist_ok=True)
    log = LOG.open("w")
    process = processes.start(
        "the gateway",
        [
            str(Path(sys.executable).with_name("weft")),
            "up",
            f"--manifests={MANIFESTS}",
            f"--run-dir={run_dir}",
            "--bind-address=127.0.0.1",
            "--advertise=127.0.0.1",
            f"--admin=127.0.0.1:{ADMIN}",
            "--access-log=json",
            "--drain-timeout=3",
        ],
        stdout=log,
        stderr=log,
    )
    log.close()
    deadline = time.monotonic() + _START_S
    why = ""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CannotRun(f"the gateway did not start: {LOG.read_text().strip()}")
        try:
            status = ask(run_dir, "/status")
        except CliError as error:
            why = error.message
        else:
            failed = [port for port in status["ports"] if not port["bound"]]
            if failed:
                raise CannotRun(f"port {failed[0]['port']} cannot be bound: {failed[0]['why']}")
            if status["ready"]:
                return
            why = ", ".join(status["notReady"])
        time.sleep(0.05)
    raise CannotRun(f"the gateway is not ready after {_START_S:g} s: {why}")


# --- what is shown -------------------------------------------------------------------------------

_BASE = f"curl -H 'Host: {HOST}' http://127.0.0.1:{HTTP}"
_TLS = (
    f"curl --resolve {HOST}:{HTTPS}:127.0.0.1 --cacert {os.path.relpath(CA)} https://{HOST}:{HTTPS}"
)
_WEBSOCKET = (
    "-sN --max-time 1 -H 'Connection: Upgrade' -H 'Upgrade: websocket' "
    "-H 'Sec-WebSocket-Version: 13' -H 'Sec-WebSocket-Key: c3RvcmVmcm9udCBleGFtcA=='"
)
TRY = (
    ("80 % catalog-v1, 20 % catalog-v2", f"{_BASE}/catalog"),
    ("a header chooses the canary", f"{_BASE}/catalog -H 'x-canary: yes'"),
    ("the path is rewritten to /cart/42", f"{_BASE}/api/cart/42"),
    ("redirected to HTTPS", f"{_BASE}/checkout -i"),
    ("HTTPS and HTTP/2", f"{_TLS}/checkout"),
    ("POST is mirrored to audit", f"{_TLS}/checkout -d order=1"),
    ("a WebSocket says how many are left", f"{_BASE}/stock {_WEBSOCKET}"),
    ("no route: 404", f"{_BASE}/nowhere -i"),
)


def introduction(run_dir: Path) -> str:
    weft = os.path.relpath(Path(sys.executable).with_name("weft"))
    lines = [
        "",
        f"The storefront is open: http://127.0.0.1:{HTTP} and https://{HOST}:{HTTPS}",
        "",
        "Try, in another terminal:",
    ]
    lines += [f"  # {what}\n  {command}" for what, command in TRY]
    lines += [
        "",
        "Look inside:",
        f"  {weft} get httproutes -A --run-dir {run_dir}",
        f"  {weft} explain GET http://{HOST}:{HTTP}/catalog --run-dir {run_dir}",
        f"  curl http://127.0.0.1:{ADMIN}/metrics",
        f"  tail -f {os.path.relpath(LOG)}",
        "",
        f"A change in {os.path.relpath(MANIFESTS)} takes effect at once. Ctrl-C ends it all.",
        "",
    ]
    return "\n".join(lines)


class View:
    """Routes, and how many requests each rule and backend has answered."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Route, rule, backend, and the answers by status code. CliError: nobody says."""
        counts: dict[tuple[str, str, str], Counter[str]] = {}
        for sample in ask(self._run_dir, "/metrics-json")["items"]:
            if sample["name"] == "weft_http_requests_total":
                labels = sample["labels"]
                route = labels["route"].rpartition("/")[2] or "(no route)"
                backend = labels["backend"].removeprefix("cluster/Service/")
                codes = counts.setdefault((route, labels["rule"], backend), Counter())
                codes[labels["code"]] += int(sample["value"])
        return [
            (*key, ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())))
            for key, codes in sorted(counts.items())
        ]

    def routes(self) -> list[str]:
        """A line for each route: name, hostnames, accepted or why not."""
        lines = []
        for route in ask(self._run_dir, "/objects", [("kind", "HTTPRoute")])["items"]:
            conditions = [
                condition
                for parent in route.get("status", {}).get("parents", ())
                for condition in parent["conditions"]
            ]
            wrong = [f"{c['reason']}: {c['message']}" for c in conditions if c["status"] != "True"]
            hosts = ", ".join(route["spec"].get("hostnames", ["*"]))
            name = route["metadata"]["name"]
            lines.append(f"{name:<18} {hosts:<20} {'; '.join(wrong) or 'accepted'}")
        return lines

    def group(self) -> Group:
        table = Table(title="Requests", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in ("ROUTE", "RULE", "BACKEND", "ANSWERS"):
            table.add_column(name)
        for row in self.rows():
            table.add_row(*row)
        return Group(Text("Routes\n" + "\n".join(self.routes()) + "\n"), table)


def watch(processes: Processes, view: View, stop: threading.Event, console: Console) -> None:
    """Show until `stop`: a live view on a terminal, else a line for each row that has changed.
    CannotRun: a process went away."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while not stop.wait(0.5):
                _still_there(processes)
                # While the agent starts again there is nobody to ask; the next look will show.
                with contextlib.suppress(CliError):
                    live.update(view.group(), refresh=True)
        return
    for line in view.routes():
        print(f"route {line}", flush=True)
    shown: set[tuple[str, ...]] = set()
    while not stop.wait(0.5):
        _still_there(processes)
        with contextlib.suppress(CliError):
            rows = view.rows()
            for row in rows:
                if row not in shown:
                    print("requests", *filter(None, row), flush=True)
            shown = set(rows)


def _still_there(processes: Processes) -> None:
    if gone := processes.ended():
        raise CannotRun(f"{gone} has ended; see {LOG}, or what is above")


def main() -> int:
    default = default_run_dir()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run-dir", type=Path, default=default.with_name(f"{default.name}-storefront")
    )
    run_dir = parser.parse_args().run_dir
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console = Console()
    processes = Processes()
    try:
        check_run_dir(run_dir)
        check_ports()
        make_secret()
        print("starting the backends and the gateway", flush=True)
        start_backends(processes)
        start_gateway(processes, run_dir)
        print(introduction(run_dir), flush=True)
        watch(processes, View(run_dir), stop, console)
    except CannotRun as error:
        print(f"storefront: {error}", file=sys.stderr)
        return 1
    finally:
        if processes:
            print("ending the gateway and the backends", flush=True)
        processes.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
