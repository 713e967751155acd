"""The CNI plugin on the node: executable and entry in the runtime's list, kept there, taken away.

The executable comes first and goes last: a list that names one which is not there would keep every
pod of the node from starting. Other plugins write their lists when they like, so the directory is
watched. Knows the node's two directories, nothing of pods.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from mesh.cni import conflist, shim
from mesh.sources.watch import Watch

_log = logging.getLogger("weft.agent")

# A file that is being written is no network either: whether it is one is looked at again.
_WRITING_S = 0.2
# The watch may miss something where a node has too few watches left.
_AGAIN_S = 60.0


class Installation:
    """`socket` is the agent's (mesh.agent.cni_socket); `problems` what is in the way, in words;
    `renewed` is called when the entry was put in, or had been lost until then."""

    def __init__(
        self, bin_dir: Path, conf_dir: Path, socket: Path, renewed: Callable[[], None]
    ) -> None:
        self.problems: list[str] = []
        self._program = bin_dir / conflist.TYPE
        self._conf_dir = conf_dir
        self._entry = {"type": conflist.TYPE, "weftSocket": str(socket)}
        self._renewed = renewed

    async def run(self) -> None:
        """For ever."""
        changed: asyncio.Queue[set[str]] = asyncio.Queue()
        watch: Watch | None = None
        try:
            while True:
                if watch is None:
                    try:
                        watch = Watch([self._conf_dir], changed, recursive=False)
                    except OSError as error:
                        _log.error("%s cannot be watched: %s", self._conf_dir, error)
                if not self._readable():
                    await asyncio.sleep(_WRITING_S)
                problems = self._install()
                for why in problems:
                    if why not in self.problems:
                        _log.error("CNI: %s", why)
                self.problems = problems
                try:
                    await asyncio.wait_for(changed.get(), _AGAIN_S)
                except TimeoutError:
                    continue
        finally:
            if watch is not None:
                watch.close()

    def _readable(self) -> bool:
        """Nothing has become unreadable since."""
        try:
            return {*conflist.unreadable(self._conf_dir)} <= {*self.problems}
        except OSError:
            return True  # which the installation says

    def _install(self) -> list[str]:
        try:
            data = shim.PROGRAM.read_bytes()
            if not self._program.exists() or self._program.read_bytes() != data:
                conflist.replace(self._program, data, 0o755)
            before = self._state()
            problems = conflist.put_in(self._conf_dir, self._entry)
            if self._state() != before:
                _log.info("the CNI plugin is in %s", self._conf_dir)
                self._renewed()
            return problems
        except OSError as error:
            return [f"the CNI plugin cannot be installed: {error.filename}: {error.strerror}"]

    def _state(self) -> list[tuple[str, int]]:
        return sorted((one.name, one.stat().st_ino) for one in self._conf_dir.iterdir())

    def remove(self, *, needed: bool) -> None:
        """Take the entry away, then the executable, unless it is `needed` still, to end pods that
        came through it: runtimes may do that by the list as it was then. What cannot be done is
        logged."""
        try:
            problems = conflist.take_out(self._conf_dir)
            for why in problems:
                _log.error("CNI: %s: take %s out of it", why, conflist.TYPE)
            if problems or needed:
                _log.info("%s stays, for pods that came through it", self._program)
            else:
                self._program.unlink(missing_ok=True)
        except OSError as error:
            _log.error("CNI: %s: %s", error.filename, error.strerror)
