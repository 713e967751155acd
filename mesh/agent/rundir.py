"""The run directory: lock, sockets, metrics files. One gateway lives in one run directory.

Knows paths and who owns them. Must stay light: the supervisor and every command import it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

KEPT_DEAD = 100
# What a file for metrics takes at first (prometheus_client), bytes.
_METRICS_FILE = 65536
# After which the lock is tried again where somebody only asks for it, in seconds.
_ASKING_S = 0.001


class RunDirError(Exception):
    """The run directory cannot be used; why and what to do, in a line."""


def default_run_dir() -> Path:
    """/run/weft for root; else weft in the user's runtime directory (or one in /tmp)."""
    if os.geteuid() == 0:
        return Path("/run/weft")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base, "weft") if base else Path(f"/tmp/weft-{os.geteuid()}")


def name_process(name: str) -> None:
    """What ps, top and "port in use by" call this process: Python's own name says little."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _locked(fd: int) -> bool:
    """Whether the lock is ours now. Who only asks whether somebody has it (`RunDir.holder`) shares
    it for a moment, and is waited for."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(fd, fcntl.LOCK_UN)
        time.sleep(_ASKING_S)


class RunDir:
    """Paths in a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.lock_file = self.path / "supervisor.lock"
        self.api_socket = self.path / "agent.sock"
        self.cni_socket = self.path / "cni.sock"
        self.metrics = self.path / "metrics"
        self.pins = self.path / "bpf"
        self.pods = self.path / "pods"
        self.svids = self.path / "svids.json"
        self.manifests = self.path / "manifests"
        self._dead: deque[int] = deque()

    def holder(self) -> dict[str, Any] | None:
        """What the running supervisor wrote into its lock file; None: none runs here."""
        try:
            with open(self.lock_file) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    with contextlib.suppress(ValueError):
                        content = json.load(file)
                        if isinstance(content, dict):
                            return content
                    return {}
        except OSError:
            pass
        return None

    def lock(self, about: dict[str, Any]) -> int:
        """Create the directory and hold its lock for the life of this process; the descriptor.

        RunDirError: somebody else holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            if self.path.stat().st_uid not in (os.geteuid(), 0):
                raise RunDirError(f"{self.path} belongs to another user: choose another --run-dir")
            fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunDirError(
                f"cannot use {self.path} as run directory: {error.strerror}: choose another one "
                "with --run-dir, or run as root"
            ) from None
        if not _locked(fd):
            pid = (self.holder() or {}).get("pid", "unknown")
            os.close(fd)
            raise RunDirError(
                f"a gateway already runs in {self.path} (pid {pid}): stop it (kill {pid}), or "
                "choose another --run-dir"
            ) from None
        try:
            os.ftruncate(fd, 0)
            os.write(fd, json.dumps({"pid": os.getpid(), **about}).encode())
        except OSError as error:
            raise RunDirError(f"cannot write {self.lock_file}: {error.strerror}") from None
        return fd

    def freshen(self, user: str) -> None:
        """Nothing of an earlier gateway's that is of no use any more; and an empty metrics
        directory that `user` (whom the workers become) may write."""
        self.api_socket.unlink(missing_ok=True)
        shutil.rmtree(self.metrics, ignore_errors=True)
        self.metrics.mkdir(mode=0o700)
        if os.geteuid() == 0:
            account = pwd.getpwnam(user)
            os.chown(self.metrics, account.pw_uid, account.pw_gid)

    def forget_worker(self, pid: int) -> None:
        """Remove a dead process's gauges of the present; its counters stay (prometheus_client's
        multiprocess mode keeps a file for each kind and process), but not of more than
        `KEPT_DEAD` processes: one that dies again and again must not fill the disk."""
        self._remove(f"gauge_live*_{pid}.db")
        self._dead.append(pid)
        if len(self._dead) > KEPT_DEAD:
            self._remove(f"*_{self._dead.popleft()}.db")

    def full(self) -> str | None:
        """What follows from too little room, if there is too little."""
        try:
            disk = os.statvfs(self.metrics)
        except OSError:
            return None
        if disk.f_bavail * disk.f_frsize >= _METRICS_FILE:
            return None
        return f"the disk under {self.path} is full: metrics of new workers and routes are not kept"

    def _remove(self, pattern: str) -> None:
        for file in self.metrics.glob(pattern):
            file.unlink(missing_ok=True)
