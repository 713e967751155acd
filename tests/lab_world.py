"""A lab for tests: commands as a user gives them, and what is left on the machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesh.lab.cgroups import cgroup_root
from mesh.lab.errors import LabError

_WEFT = [sys.executable, "-c", "from mesh.cli.main import main; main()"]
# Generous: only a hang reaches it.
LIMIT_S = 60


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "only root can make namespaces"
    try:
        root = cgroup_root()
    except LabError as error:
        return str(error)
    return None if os.access(root, os.W_OK) else f"{root} cannot be written"


needs_root = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "")


class Lab:
    """One lab in a run directory of its own."""

    def __init__(self, run_dir: Path, name: str, config: str) -> None:
        self.name = name
        self.run_dir = run_dir
        self.file = run_dir.parent / f"{name}.yaml"
        self.file.write_text(config)

    def arguments(self, command: str, *args: str) -> list[str]:
        return [*_WEFT, "lab", command, "--name", self.name, "--run-dir", str(self.run_dir), *args]

    def weft(self, command: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(command, *args), capture_output=True, text=True, timeout=LIMIT_S
        )

    def node(self, node: str, *args: str) -> subprocess.CompletedProcess[str]:
        """A command for the Weft of a node, such as `weft status`."""
        run_dir = self.run_dir / self.name / "nodes" / f"{node}.weft"
        return subprocess.run(
            [*_WEFT, *args, "--run-dir", str(run_dir)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )

    def up(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.weft("up", *args, str(self.file))

    def run(self, where: str, *command: str) -> subprocess.CompletedProcess[str]:
        return self.weft("exec", where, "--", *command)

    def python(self, where: str, program: str, *args: str) -> str:
        """What a Python program printed in a pod; it must succeed."""
        done = self.run(where, "python3", "-c", program, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def leftovers(self) -> list[str]:
        """Network namespaces, cgroups, files, mounts and processes of the lab."""
        found = [
            *Path("/run/netns").glob(f"weft.{self.name}.*"),
            *cgroup_root().glob(self.name),
            *self.run_dir.glob("*"),
        ]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        mounted = [line for line in mounts if str(self.run_dir) in line]
        return [*map(str, found), *mounted, *processes_with(str(self.run_dir))]


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that comes with another process's work."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def processes_with(text: str) -> list[str]:
    """Processes that have a text in their command line or environment, this one aside."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            with contextlib.suppress(OSError):
                for part in ("cmdline", "environ"):
                    if text.encode() in (directory / part).read_bytes():
                        found.append(f"pid {directory.name}")
    return found


def host_links() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


@contextlib.contextmanager
def lab_of(directory: Path, name: str, config: str) -> Iterator[Lab]:
    """A lab that is not up yet, and is gone afterwards whatever happened."""
    lab = Lab(directory / "run", f"{name}-{os.getpid()}", config)
    try:
        yield lab
    finally:
        lab.weft("down")
    assert lab.leftovers() == []
