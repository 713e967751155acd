"""The gateway under test: `weft up` as a user starts it, and what `weft get` would show."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mesh.cli.client import CliError, ask

POOL = "127.64.0.0/16"
CLASS_NAME = "weft-acceptance"
POLL_S = 0.02


class GatewayFailed(Exception):
    """It did not come up, or went away."""


class Agent:
    """What the agent of a run directory says."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def status(self) -> dict[str, Any]:
        """What `weft status` shows. CliError: the agent does not answer."""
        answer = ask(self.run_dir, "/status")
        assert isinstance(answer, dict)
        return answer

    def objects(self, kind: str, namespace: str = "", name: str = "") -> list[dict[str, Any]]:
        """What `weft get` shows, with status."""
        query = [("kind", kind)]
        query += [
            (key, value) for key, value in (("namespace", namespace), ("name", name)) if value
        ]
        items = ask(self.run_dir, "/objects", query)["items"]
        assert isinstance(items, list)
        return items

    def problems(self) -> list[dict[str, Any]]:
        items = ask(self.run_dir, "/problems")["items"]
        assert isinstance(items, list)
        return items


class GatewayProcess(Agent):
    """`weft up` in a run directory of its own, on a manifests directory (None: the options say
    where objects come from)."""

    def __init__(self, manifests: Path | None, run_dir: Path, *options: str) -> None:
        super().__init__(run_dir)
        self.log_file = run_dir.parent / "weft.log"
        self._command = [
            str(Path(sys.executable).with_name("weft")),
            "up",
            *((f"--manifests={manifests}",) if manifests is not None else ()),
            f"--run-dir={run_dir}",
            "--drain-timeout=1",
            *options,
        ]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self, within_s: float = 20.0) -> None:
        """Start, and wait until it is ready. GatewayFailed: it is not in time."""
        with self.log_file.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        why = "it has not answered"
        try:
            async with asyncio.timeout(within_s):
                while True:
                    if self._process.returncode is not None:
                        raise GatewayFailed(f"weft up ended: {self.log_tail()}")
                    try:
                        status = self.status()
                    except CliError as error:
                        why = error.message
                    else:
                        if status["ready"]:
                            return
                        why = str(status["notReady"])
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise GatewayFailed(
                f"weft up is not ready after {within_s:g} s: {why}\n{self.log_tail()}"
            ) from None

    async def stop(self) -> int:
        """SIGTERM, then SIGKILL to all of its processes where that is not enough; the exit code."""
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        assert process.returncode is not None
        return process.returncode

    def log_tail(self, lines: int = 15) -> str:
        text = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return "\n".join(text.splitlines()[-lines:])
