"""`make run` as a user meets it: by the lines it prints. Needs root and eBPF."""

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
from bpf_world import needs_bpf
from lab_world import LIMIT_S, Lab, host_links, needs_root

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "examples" / "storefront" / "run.py"

pytestmark = [
    needs_root,
    needs_bpf,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]


class Storefront:
    """run.py with a lab of its own; what it printed before it began to watch."""

    def __init__(self, run_dir: Path) -> None:
        self.links = host_links()
        self.run_dir = run_dir
        self.name = f"front-{os.getpid()}"
        self.command = [sys.executable, RUN, f"--run-dir={run_dir}", f"--name={self.name}"]
        self.process = subprocess.Popen(
            self.command,
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
            if line.startswith("Requests and connections"):
                break
        else:
            raise AssertionError(f"run.py ended: {self.printed}")

    def run(self, line: str) -> str:
        """Output of a line as it was printed."""
        done = subprocess.run(
            shlex.split(line), cwd=ROOT, capture_output=True, timeout=LIMIT_S, check=False
        )
        return done.stdout.decode(errors="replace")

    def curl(self, what: str) -> str:
        """Run the line that was printed under "# <what>"."""
        found = re.search(rf"  # {re.escape(what)}\n  (.* -- curl .*)", self.printed)
        assert found, self.printed
        return self.run(found[1].replace(" curl ", " curl -sS --max-time 10 ", 1))

    def wait_for(self, pattern: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if re.search(pattern, line):
                return
        raise AssertionError(f"run.py ended without saying {pattern}")


@pytest.fixture(scope="module")
def storefront(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storefront]:
    running = Storefront(tmp_path_factory.mktemp("storefront") / "run")
    yield running
    if running.process.poll() is None:
        running.process.terminate()
        running.process.communicate(timeout=LIMIT_S)


def test_it_shows_a_request_that_crosses_nodes(storefront: Storefront) -> None:
    shown = re.search(r"^\$ .* outside/client -- curl .*\n(\{.*\})$", storefront.printed, re.M)
    assert shown, storefront.printed
    assert '"pod": "catalog-v2", "node": "b", "client": "172.18.0.3"' in shown[1]
    assert '"x-forwarded-for": "192.168.18.2"' in shown[1]


def test_the_lines_it_prints_do_what_they_say(storefront: Storefront) -> None:
    assert '"pod": "catalog-v' in storefront.curl("80 % catalog-v1, 20 % catalog-v2")
    assert '"GET /cart/42"' in storefront.curl("the path is rewritten to /cart/42")
    redirected = storefront.curl("redirected to HTTPS")
    assert "location: https://shop.example.test/checkout" in redirected
    assert '"checkout"' in storefront.curl("HTTPS and HTTP/2, by the other node")
    assert '"POST /checkout"' in storefront.curl("POST is mirrored to audit")
    assert "12 left" in storefront.curl("a WebSocket says how many are left")
    assert "404 Not Found" in storefront.curl("no route: 404")
    assert '"pod": "catalog-v' in storefront.curl("from pod to Service: 80 % to 20 % again")
    storefront.wait_for("storefront/kiosk.* storefront/catalog-v.*GET http://catalog/.* 200 ")


def test_what_it_says_to_look_at_is_well(storefront: Storefront) -> None:
    look = storefront.printed.partition("Look inside:\n")[2]
    status, routes, explained = (storefront.run(line) for line in look.splitlines()[:3])
    assert "False" not in status
    assert len(routes.splitlines()) == 6
    assert "False" not in routes
    assert "route:    HTTPRoute/storefront/catalog" in explained


def test_a_second_one_is_refused_in_words(storefront: Storefront) -> None:
    second = subprocess.run(storefront.command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1
    assert f"storefront: lab {storefront.name} is up: remove it with" in second.stderr


def test_without_root_it_says_what_is_missing(storefront: Storefront) -> None:
    drop = f"import os, runpy; os.setuid(65534); runpy.run_path({str(RUN)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", drop], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "which only root can make: run 'sudo make run'" in done.stderr


def test_ctrl_c_takes_everything_down(storefront: Storefront) -> None:
    storefront.process.send_signal(signal.SIGINT)
    rest, _ = storefront.process.communicate(timeout=LIMIT_S)
    assert storefront.process.returncode == 0, rest
    lab = Lab(storefront.run_dir, storefront.name, "")
    lab.file.unlink()
    assert lab.leftovers() == []
    assert host_links() == storefront.links
