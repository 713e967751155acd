"""The storefront in a lab: starts it, shows a request, says what to try, shows what happens.

`make run` runs this, as root. Ctrl-C (or SIGTERM) takes the lab down. Exit codes: 0 ended as asked,
1 it could not be started or went away.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from cryptography import x509

from certs.selfsigned import Authority
from mesh.cli.client import CliError, ask
from mesh.lab.errors import LabError
from mesh.lab.lab import down, up
from mesh.lab.plan import Plan
from mesh.lab.state import DEFAULT_RUN_DIR, LabDir

HERE = Path(__file__).resolve().parent
LAB = HERE / "lab.yaml"
MANIFESTS = HERE / "manifests"
SECRET = MANIFESTS / "secret.generated.yaml"
CA = HERE / "ca.generated.pem"
WEFT = os.path.relpath(Path(sys.executable).with_name("weft"))
HOST = "shop.example.test"
_START_S = 30.0
_RENEW = datetime.timedelta(days=7)


class CannotRun(Exception):
    """What is in the way, and what to do about it."""


def check_rights() -> None:
    """CannotRun: a lab takes root."""
    if os.geteuid() != 0:
        raise CannotRun(
            "the storefront's nodes and pods are network namespaces and cgroups, which only root "
            "can make: run 'sudo make run'.\nWithout root, Weft is an ingress gateway for backends "
            f"that you start yourself: {WEFT} up --manifests DIR"
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


class Storefront:
    """A lab that is up."""

    def __init__(self, run_dir: Path, plan: Plan) -> None:
        self._plan = plan
        self._lab = LabDir(run_dir, plan.name)
        self._options = [] if run_dir == DEFAULT_RUN_DIR else ["--run-dir", str(run_dir)]
        if len(list(run_dir.glob("*/"))) > 1:
            self._options += ["--name", plan.name]

    def run_dirs(self) -> list[str]:
        return [f"--run-dir={self._lab.weft(node.name).path}" for node in self._plan.nodes]

    def line(self, command: str, where: str = "", what: str = "") -> str:
        """A `weft lab` command as somebody types it."""
        return " ".join(filter(None, [WEFT, "lab", command, *self._options, where, what]))

    def curl(self, what: str, where: str = "outside/client") -> str:
        return self.line("exec", where, f"-- curl {what}")

    def suggestions(self) -> Sequence[tuple[str, str]]:
        """What to try, and the line for it."""
        a, b = (node.addresses[0] for node in self._plan.nodes)
        plain = f"-H 'Host: {HOST}' http://{a}"
        tls = f"--resolve {HOST}:443:{b} --cacert {os.path.relpath(CA)} https://{HOST}"
        websocket = (
            "-sN --max-time 1 -H 'Connection: Upgrade' -H 'Upgrade: websocket' "
            "-H 'Sec-WebSocket-Version: 13' -H 'Sec-WebSocket-Key: c3RvcmVmcm9udCBleGFtcA=='"
        )
        return (
            ("80 % catalog-v1, 20 % catalog-v2", self.curl(f"{plain}/catalog")),
            ("the path is rewritten to /cart/42", self.curl(f"{plain}/api/cart/42")),
            ("redirected to HTTPS", self.curl(f"-i {plain}/checkout")),
            ("HTTPS and HTTP/2, by the other node", self.curl(f"{tls}/checkout")),
            ("POST is mirrored to audit", self.curl(f"{tls}/checkout -d order=1")),
            ("a WebSocket says how many are left", self.curl(f"{websocket} {plain}/stock")),
            ("no route: 404", self.curl(f"-i {plain}/nowhere")),
            ("from pod to Service: 80 % to 20 % again", self.curl("http://catalog/", "kiosk")),
        )

    def introduce(self) -> None:
        """Show a request that crosses nodes, and what else there is. CannotRun: it fails."""
        address = self._plan.nodes[0].addresses[0]
        crossing = self.curl(f"-sS -H 'Host: {HOST}' -H 'x-canary: yes' http://{address}/catalog")
        answer = _succeed(crossing)
        print("\nFrom the client outside to the gateway on node a, to a pod on node b:\n")
        print(f"$ {crossing}\n{answer}")
        print("Try, in another terminal:")
        for what, line in self.suggestions():
            print(f"  # {what}\n  {line}")
        first = self.run_dirs()[0]
        print("\nLook inside:")
        print(f"  {self.line('status')}")
        print(f"  {WEFT} get httproutes -A {first}")
        print(f"  {WEFT} explain GET http://{HOST}/catalog {first}")
        where = os.path.relpath(MANIFESTS)
        print(f"\nA change in {where} takes effect at once. Ctrl-C takes it all down.")
        print("\nRequests and connections, as they happen:", flush=True)

    def complain(self) -> None:
        """Say what the nodes cannot do on this host."""
        for node in self._plan.nodes:
            with contextlib.suppress(CliError):
                for why in ask(self._lab.weft(node.name).path, "/status")["degraded"]:
                    print(f"! node {node.name}: {why}; the Gateway works without")

    def watch(self) -> None:
        """Show flows until Ctrl-C. CannotRun: the lab has gone."""
        subprocess.run([WEFT, "observe", "-f", "--last=0", *self.run_dirs()], check=False)
        raise CannotRun(f"nothing to see any more; is the lab still up? {self.line('status')}")


def _succeed(line: str) -> str:
    """What a command prints once it succeeds: routes and endpoints take a moment to be in force.
    CannotRun: it does not, in time."""
    deadline = time.monotonic() + _START_S
    while True:
        command = shlex.split(line.replace(" curl ", " curl -f "))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
        if time.monotonic() > deadline or done.returncode == 127:
            raise CannotRun(f"this fails: {line}\n{done.stderr.strip()}")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR)
    parser.add_argument("--name", help="of the lab; default that of lab.yaml")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = None
    try:
        check_rights()
        make_secret()
        print("starting the lab", flush=True)
        status = up(LAB, args.run_dir, args.name, _START_S)
        name = status.plan.name
        storefront = Storefront(args.run_dir, status.plan)
        storefront.complain()
        storefront.introduce()
        storefront.watch()
    except KeyboardInterrupt:
        return 0
    except (CannotRun, LabError) as error:
        print(f"storefront: {error}", file=sys.stderr)
        return 1
    finally:
        if name is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("taking the lab down", flush=True)
            down(args.run_dir, name)


if __name__ == "__main__":
    sys.exit(main())
