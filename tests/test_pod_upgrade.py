"""Another version of Weft takes over at pods' interfaces: no packet passes that policy refuses, no
connection ends that it allows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bpf_world import ROOT, TIMEOUT_S, needs_bpf
from pod_policies import KNOWN, only, policy
from pod_world import OUT, B, pod_world

pytestmark = needs_bpf

# A Weft with another layout of the maps: first its loader, then its agent.
_OTHER_WEFT = """
import sys
from pathlib import Path
from bpf import constants
constants.PLAIN *= 2
from bpf import loader, podfilter, versions
from bpf.enforcement import Enforcement
from pod_policies import KNOWN, only, policy
records, pin = map(Path, sys.argv[-2:])
if sys.argv[1] == "--pin":
    del sys.argv[2]
    sys.exit(loader.main())
Enforcement(pin, "n1").replace({**KNOWN, **policy(ingress=only())})
versions.take_over(pin)
assert podfilter.renew(pin, records) == []
"""


def other_weft(what: str, records: Path, pin: Path) -> None:
    command = [sys.executable, "-c", _OTHER_WEFT, what, str(records), str(pin)]
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        command, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr


def test_policy_is_in_force_throughout(tmp_path: Path) -> None:
    with pod_world(tmp_path) as world:
        world.enforce({**KNOWN, **policy(ingress=only())})
        with (
            world.listen("b", B[4]) as server,
            world.listen("out", OUT[4]) as elsewhere,
            world.connection("b", elsewhere) as (near, far),
        ):
            for step in ("--pin", "agent"):
                other_weft(step, tmp_path / "pods", world.pin)
                assert world.attempt("a", server).what == "ECONNREFUSED", step
                # An answer to what b has opened before, which only its flow lets pass.
                far.sendall(step.encode())
                assert near.recv(100) == step.encode()
