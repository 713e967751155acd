"""`make run` as a user meets it: in a network namespace of its own, by the lines it prints."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "examples" / "storefront" / "run.py"
_WITHIN_S = 30


def _isolation() -> str:
    """Why this cannot be tried here; "" if it can."""
    for program in ("unshare", "nsenter", "ip", "curl"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "network namespaces need root"


pytestmark = pytest.mark.skipif(bool(_isolation()), reason=_isolation())


class Storefront:
    """run.py in a network namespace; what it printed before it began to watch."""

    def __init__(self, run_dir: Path) -> None:
        script = f"ip link set lo up && exec {sys.executable} {RUN} --run-dir {run_dir}"
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line
            if line.startswith("route "):
                break
        else:
            raise AssertionError(f"run.py ended: {self.printed}")

    def run(self, command: str) -> str:
        """Output of a command in the namespace."""
        inside = ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *shlex.split(command)]
        result = subprocess.run(
            inside, cwd=ROOT, capture_output=True, timeout=_WITHIN_S, check=False
        )
        return result.stdout.decode(errors="replace")

    def curl(self, what: str) -> str:
        """Run the line that was printed under "# <what>"."""
        found = re.search(rf"  # {re.escape(what)}\n  (curl .*)", self.printed)
        assert found, self.printed
        return self.run(found[1].replace("curl ", "curl -sS --max-time 10 ", 1))

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"run.py ended without saying {text}")


@pytest.fixture(scope="module")
def storefront(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storefront]:
    running = Storefront(tmp_path_factory.mktemp("storefront") / "run")
    yield running
    if running.process.poll() is None:
        running.process.terminate()
        running.process.communicate(timeout=_WITHIN_S)


def test_the_lines_it_prints_do_what_they_say(storefront: Storefront) -> None:
    assert '"catalog-v' in storefront.curl("80 % catalog-v1, 20 % catalog-v2")
    assert '"catalog-v2"' in storefront.curl("a header chooses the canary")
    assert '"GET /cart/42"' in storefront.curl("the path is rewritten to /cart/42")
    redirected = storefront.curl("redirected to HTTPS")
    assert "location: https://shop.example.test:8443/checkout" in redirected
    assert '"checkout"' in storefront.curl("HTTPS and HTTP/2")
    assert '"POST /checkout"' in storefront.curl("POST is mirrored to audit")
    assert "12 left" in storefront.curl("a WebSocket says how many are left")
    assert "404 Not Found" in storefront.curl("no route: 404")
    storefront.wait_for("requests (no route) 404: 1")


def test_a_second_one_is_refused_in_words(storefront: Storefront, tmp_path: Path) -> None:
    said = storefront.run(f"sh -c '{sys.executable} {RUN} --run-dir {tmp_path / 'run'} 2>&1'")
    assert "port 8080 of 127.0.0.1 is in use" in said


def test_ctrl_c_ends_everything(storefront: Storefront) -> None:
    namespace = os.readlink(f"/proc/{storefront.process.pid}/ns/net")
    storefront.process.send_signal(signal.SIGINT)
    storefront.process.communicate(timeout=_WITHIN_S)
    assert storefront.process.returncode == 0
    assert _processes_in(namespace) == []


def _processes_in(namespace: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns" / "net") == namespace:
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found
