"""A child process of the supervisor and its control socket, started again whenever it ends.

Knows processes and back-off, not what they do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from mesh.model.channel import Control, receive_control, send_control

_log = logging.getLogger("weft.supervisor")

# The first restart is immediate; then the pause doubles from 0.1 s up to this.
MAX_PAUSE_S = 5.0
# A child that stayed up this long starts with a clean slate.
STABLE_S = 3.0


def restart_pause(failures: int) -> float:
    """Seconds to wait before the restart after the n-th failure in a row (from 1)."""
    return 0.0 if failures <= 1 else min(0.1 * 2.0 ** min(failures - 2, 16), MAX_PAUSE_S)


class Child:
    """One process. `command(control_fd)` is what to run; `started` is called after each start,
    `ended(pid)` after each end, `message` with what it says over the control socket."""

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        *,
        env: dict[str, str] | None = None,
        directory: Path | None = None,
        started: Callable[[], None],
        ended: Callable[[int], None],
        message: Callable[[Control, list[int]], None],
    ) -> None:
        self.name = name
        self.pid: int | None = None
        self.stopping = False
        self.restarts = 0
        self.gone = asyncio.Event()
        self._command = command
        self._env = env
        self._directory = directory
        self._started = started
        self._ended = ended
        self._message = message
        self._failures = 0
        self._since = 0.0
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Start the process. OSError (no memory, no such program) counts as its end."""
        self._restart = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    self._command(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env=self._env,
                    cwd=self._directory,
                )
            pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            ours.close()
            self._again(f"cannot be started: {error}")
            return
        self._since = self._loop.time()
        self._control = ours
        self.pid = self._process.pid
        self.gone.clear()
        self._loop.add_reader(ours.fileno(), self._readable)
        self._loop.add_reader(pidfd, self._exited, pidfd)
        self._started()

    def send(self, message: Control, fds: tuple[int, ...] = ()) -> None:
        """Send, if the process is there; one that does not read its control socket is ended."""
        if self._control is None:
            return
        try:
            send_control(self._control, message, fds)
        except BlockingIOError:
            _log.error(
                "%s (pid %s) does not listen to its supervisor: ending it", self.name, self.pid
            )
            self.kill(signal.SIGKILL)
        except OSError as error:
            if self.pid is not None:
                _log.debug("%s (pid %d): %s", self.name, self.pid, error)

    def kill(self, number: signal.Signals) -> None:
        if self._process is not None and self.pid is not None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """No restart from now on."""
        self.stopping = True
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self.pid is None:
            self.gone.set()

    def close_control(self) -> None:
        """The process sees the end of its control socket."""
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    def _readable(self) -> None:
        while self._control is not None:
            try:
                received = receive_control(self._control)
            except BlockingIOError:
                return
            except (OSError, ValueError) as error:
                _log.error("%s (pid %s): %s", self.name, self.pid, error)
                received = None
            if received is None:
                # Its process is ending, or it is of no use any more.
                self.close_control()
                self.kill(signal.SIGTERM)
                return
            self._message(*received)

    def _exited(self, pidfd: int) -> None:
        assert self._process is not None
        assert self.pid is not None
        self._readable()
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        pid, code = self.pid, self._process.wait()
        self.pid = self._process = None
        self.close_control()
        self.gone.set()
        self._ended(pid)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._again(f"(pid {pid}) ended by {how}")

    def _again(self, why: str) -> None:
        if self.stopping:
            self.gone.set()
            return
        stable = self._since and self._loop.time() - self._since >= STABLE_S
        self._failures = 1 if stable else self._failures + 1
        pause = restart_pause(self._failures)
        when = f"in {pause:.1f} s" if pause else "now"
        _log.warning("%s %s: starting it again %s", self.name, why, when)
        self.restarts += 1
        self._restart = self._loop.call_later(pause, self.start)
