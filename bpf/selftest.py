"""The self-test of the data path on this kernel: one check for each fact that it relies on.

It loads the real programs from a pin directory of its own onto a cgroup of its own, and a process
in a network namespace of its own connects (bpf.selftest_probe). Nothing of a running data path is
touched, and everything goes away again; what a killed self-test left, the next one removes.
`python -m bpf.selftest --directory DIR --cgroup PARENT` prints the checks; exit status 1: one
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from bpf import maps, pins, structs
from bpf.attach import attach
from bpf.balancer import Balancer
from bpf.errors import DatapathError
from bpf.loader import load
from bpf.selftest_probe import FRONTENDS, LOOPBACK, PORT, REFUSED_PORT
from bpf.structs import Number, Target
from mesh.model.nodeconfig import EntryBackend, LoadBalancerEntry

# In the order in which they are checked; the first three are needed by all that follow.
FACTS = {
    "cgroup": "a cgroup of version 2 can be made",
    "programs": "the programs compile, pass the verifier, attach and are pinned",
    "maps": "a table written through memory is the table that bpf(2) reads",
    "connect4": "connect(2) can be sent elsewhere, IPv4",
    "connect6": "connect(2) can be sent elsewhere, IPv6",
    "mapped": "connect(2) of an IPv6 socket to an IPv4 frontend too",
    "getpeername4": "a socket cookie finds the original destination again, IPv4",
    "getpeername6": "a socket cookie finds the original destination again, IPv6",
    "udp4": "datagrams go to a backend, and answers come from the frontend, IPv4",
    "udp6": "datagrams go to a backend, and answers come from the frontend, IPv6",
    "refusal": "a program chooses the errno of a connection it refuses",
    "relay": "a proxy finds with its socket what a workload asked for, and no rights are needed",
    "redirect4": "what a proxy sends arrives by redirect, whole and in order, IPv4",
    "redirect6": "what a proxy sends arrives by redirect, whole and in order, IPv6",
    "fionread": "FIONREAD counts redirected bytes, so that nginx, Java and .NET do not stall",
    "queue": "the bytes that a workload has not read yet can be counted",
    "half_close": "what was redirected before the end of a connection is read before that end",
    "backend": "a backend's socket is enrolled before the proxy sends to it, and found",
    "deferred": "a backend with TCP_DEFER_ACCEPT is noticed before anything is sent to it",
    "miss": "a redirect that misses fails, and never goes by TCP",
    "pairs": "requests that a table lets pass go to a workload, their responses back, by numbers",
    "filter": "a program can be attached to an interface, both ways",
    "refusals": "a refused connection is answered at once, and the longest prefix decides which is",
    "own_stack": "a packet of the node's own is told from one that came in by an interface",
    "events": "the programs' events can be read",
    "detach": "a program without pin is detached",
}
# Those that only sending by redirect relies on.
REDIRECT_FACTS = frozenset(
    (
        "redirect4",
        "redirect6",
        "fionread",
        "queue",
        "half_close",
        "backend",
        "deferred",
        "miss",
    )
)
# Those that only requests which pass by the proxy rely on, beside these.
PAIR_FACTS = frozenset(("pairs",))
_NAME = "selftest"
_PROBE_S = 30


class Check(NamedTuple):
    """One fact of FACTS on this kernel; `why` not, and what to do, if it is not `ok`."""

    name: str
    ok: bool
    why: str


class _Failed(Exception):
    """Why a check failed."""


T = TypeVar("T", int, str)


def run(directory: Path, cgroup: Path, name: str = _NAME) -> list[Check]:
    """All checks, in the order of FACTS. `directory` and `cgroup` (of version 2) are where the
    self-test makes a directory and cgroups with that name. Blocks for a second or two."""
    why: dict[str, str] = {}
    stage = "cgroup"
    try:
        with _own_cgroup(cgroup / name) as own, _own_cgroup(cgroup / f"{name}.proxy") as proxy:
            why["cgroup"] = ""
            stage = "programs"
            # The probe starts while this loads.
            with _own_pins(directory / name) as pin, _probe(own, proxy, pin) as probe:
                load(pin)
                attach(pin, own, proxy, pairs=True)
                why["programs"] = ""
                stage = "maps"
                _fill(pin, probe.ask("serve", int))
                why["maps"] = ""
                stage = "connect4"
                why |= probe.ask("steered", str)
                stage = "relay"
                why |= probe.ask("redirected", str)
                stage = "detach"
                pins.remove(pin)
                why |= probe.ask("detached", str)
    except (_Failed, DatapathError) as error:
        why[stage] = str(error)
    except OSError as error:
        advice = ": it takes root" if isinstance(error, PermissionError) else ""
        why[stage] = f"{error.filename or FACTS[stage]}: {error.strerror}{advice}"
    not_tried = f"not tried, because of {stage}"
    whys = {name: why.get(name, not_tried) for name in FACTS}
    return [Check(name, not reason, reason) for name, reason in whys.items()]


@contextlib.contextmanager
def _own_cgroup(path: Path) -> Iterator[Path]:
    if not (path.parent / "cgroup.controllers").exists():
        raise _Failed(f"{path.parent} is not a directory of cgroup v2: mount it, or name another")
    if path.is_dir():
        path.rmdir()
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


@contextlib.contextmanager
def _own_pins(path: Path) -> Iterator[Path]:
    pins.remove(path)
    try:
        yield path
    finally:
        pins.remove(path)


def _fill(pin: Path, ports: dict[str, int]) -> None:
    """Frontends for the probe; `ports` are its servers', "TCP4" for example."""
    entries: dict[str, LoadBalancerEntry] = {}
    for server, port in ports.items():
        protocol: Literal["TCP", "UDP"] = "TCP" if server.startswith("TCP") else "UDP"
        version = server[-1]
        backend = EntryBackend(LOOPBACK[version], port)
        for asked, backends in ((PORT, (backend,)), (REFUSED_PORT, ())):
            entries[f"{server}/{asked}"] = LoadBalancerEntry(
                FRONTENDS[version], asked, protocol, backends, "self-test"
            )
    balancer = Balancer(pin)
    try:
        refused = balancer.replace(entries)
    finally:
        balancer.close()
    if refused:
        raise _Failed("; ".join(refused.values()))
    frontends = maps.PinnedMap(pin, "frontends", Target, structs.Frontend)
    slots = maps.PinnedMap(pin, "slots", Number, Number)
    try:
        for _, (offset, size, *_) in frontends.items():
            if any(slots.get(Number(offset + at)) == Number(0) for at in (0, size - 1) if size):
                raise _Failed("a slot written through memory is empty when read with bpf(2)")
    finally:
        frontends.close()
        slots.close()


class _Probe:
    """The process that connects."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, what: str, kind: type[T]) -> dict[str, T]:
        """The answer to a command, whose values are of a kind. _Failed: there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: then it does not answer either
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _PROBE_S)[0]:
            raise _Failed(f"the probe did not answer within {_PROBE_S} s")
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            words = self._process.stderr.read().strip().splitlines()
            raise _Failed(f"the probe ended: {words[-1] if words else 'it does not say why'}")
        answers = msgspec.json.decode(line, type=dict[str, int | str])
        return {name: kind(answer) for name, answer in answers.items()}


@contextlib.contextmanager
def _probe(cgroup: Path, proxy_cgroup: Path, pin: Path) -> Iterator[_Probe]:
    command = [sys.executable, "-P", "-m", "bpf.selftest_probe"]
    command += [str(cgroup), str(proxy_cgroup), str(pin)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    with process:
        try:
            yield _Probe(process)
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bpf.selftest", description="Tests the data path on this kernel."
    )
    parser.add_argument(
        "--directory", type=Path, required=True, help="where to pin; made if missing"
    )
    parser.add_argument("--cgroup", type=Path, required=True, help="a cgroup v2 directory")
    parser.add_argument("--name", default=_NAME, help="of what is made there and goes again")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args()
    checks = run(args.directory, args.cgroup, args.name)
    if args.json:
        print(msgspec.json.encode(checks).decode())
        return 0
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'} {check.name:13} {check.why or FACTS[check.name]}")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
