"""Real programs on a real cgroup for tests: made by the loader, taken away whatever happens."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf import pins, syscall

ROOT = Path(__file__).resolve().parents[1]
ACTOR = Path(__file__).with_name("bpf_actor.py")
TIMEOUT_S = 30
_numbers = itertools.count()


def cgroup_mount() -> Path | None:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


def missing() -> str | None:
    """What this machine lacks to run eBPF programs; None: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    if importlib.util.find_spec("bcc") is None:
        return "needs python3-bpfcc"
    mount = cgroup_mount()
    if mount is None or not os.access(mount, os.W_OK):
        return "needs cgroup v2, writable"
    try:
        syscall.pinned("/nowhere/to/be/found")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"needs bpf(2): {error.strerror}"
    return None


needs_bpf = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def sweep(mount: Path) -> None:
    """Takes away what a test run that was killed left."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    left = [*map(Path, mounts), *mount.glob("weft-test-*")]
    for path in left:
        found = re.fullmatch(r"weft-(?:pins|test)-(\d+)-\d+(?:\.proxy)?", path.name)
        if found and not Path("/proc", found[1]).exists():
            if path.parent == mount:
                path.rmdir()
            else:
                pins.remove(path)


@contextlib.contextmanager
def new_cgroup() -> Iterator[Path]:
    mount = cgroup_mount()
    assert mount is not None
    sweep(mount)
    path = mount / f"weft-test-{os.getpid()}-{next(_numbers)}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()
        with contextlib.suppress(FileNotFoundError):
            path.with_name(f"{path.name}.proxy").rmdir()


@contextlib.contextmanager
def pin_directory(parent: Path) -> Iterator[Path]:
    path = parent / f"weft-pins-{os.getpid()}-{next(_numbers)}"
    try:
        yield path
    finally:
        pins.remove(path)


def loader(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bpf.loader", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


class Actor:
    """A process in the cgroup; see bpf_actor.py for what it does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, function: str, *arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([function, *arguments]) + "\n")
        self.process.stdin.flush()

    def result(self):
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        assert ready, "the actor does not answer"
        line = self.process.stdout.readline()
        assert line, "the actor has ended"
        return json.loads(line)

    def busy(self) -> bool:
        """Whether the result of what was started is not there yet."""
        return not select.select([self.process.stdout], [], [], 0)[0]

    def __call__(self, function: str, *arguments: object):
        self.start(function, *arguments)
        return self.result()


@contextlib.contextmanager
def new_actor(cgroup: Path, netns: Path | None = None) -> Iterator[Actor]:
    with subprocess.Popen(
        [sys.executable, str(ACTOR), str(cgroup), *([str(netns)] if netns else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            actor = Actor(process)
            assert actor.result() == "ready"
            yield actor
        finally:
            process.kill()


@contextlib.contextmanager
def steered(parent: Path) -> Iterator[tuple[Path, Path, Actor]]:
    """A pin directory, a cgroup steered from it, and a process in that."""
    with new_cgroup() as cgroup, pin_directory(parent) as pin:
        done = loader("--pin", pin, "--cgroup", cgroup)
        assert done.returncode == 0, done.stderr
        with new_actor(cgroup) as actor:
            yield pin, cgroup, actor
