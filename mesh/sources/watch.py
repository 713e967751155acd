"""Watching directories: paths that changed, as soon as they did.

A thread waits in watchfiles' inotify backend, which groups what happens within `STEP_MS`; the watch
stands from the constructor on, so that nothing falls between a first reading and it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path

from watchfiles._rust_notify import RustNotify

# Two steps pass between a write and its report; shorter ones cost more CPU when nothing happens.
STEP_MS = 2
# However fast changes follow each other, they are reported this often.
DEBOUNCE_MS = 50


class Watch:
    """Paths below `directories` (or directly in them) go to `queue` in sets, from construction
    until `close`. OSError: a directory cannot be watched."""

    def __init__(
        self, directories: Iterable[Path], queue: asyncio.Queue[set[str]], *, recursive: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = queue
        self._stop = threading.Event()
        paths = [str(directory) for directory in directories]
        self._notify = RustNotify(paths, False, False, 0, recursive, True)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._notify as notify:
            while not self._stop.is_set():
                changes = notify.watch(DEBOUNCE_MS, STEP_MS, 60_000, self._stop)
                if isinstance(changes, set):
                    paths = {path for _, path in changes}
                    try:
                        self._loop.call_soon_threadsafe(self._queue.put_nowait, paths)
                    except RuntimeError:  # the loop is closed
                        return

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
