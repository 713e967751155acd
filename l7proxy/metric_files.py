"""The values of metrics in files, as prometheus_client's multiprocess mode has them.

It maps sparse files into memory: on a full disk the first write to a page without a block ends the
process (SIGBUS). Here files are allocated before they are mapped. A value that gets no place counts
in memory, where nobody sees it, and moves into the file, whole, once there is room. And its values
ask for the process id and take a lock whenever they change; these do not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from collections.abc import Sequence
from typing import ClassVar

from prometheus_client.mmap_dict import _INITIAL_MMAP_SIZE, MmapedDict, mmap_key

_log = logging.getLogger("weft.metrics")

_pack_into = struct.Struct("dd").pack_into
# Between two tries to find room again, in seconds.
_RETRY_S = 1.0


class AllocatedDict(MmapedDict):
    """prometheus_client's dict of values by key, in a file; the values themselves are kept by their
    owners, who write them here."""

    _retry_at = 0.0  # once there was no room, for all files

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self._name = filename
        self._opened = False
        self._positions: dict[str, int] = {}
        self._placed("")

    def read_value(self, key: str) -> tuple[float, float]:
        if not self._placed(key):
            return 0.0, 0.0
        return super().read_value(key)  # type: ignore[no-untyped-call,no-any-return]

    def place(self, key: str) -> int:
        """Where the value of `key` is in the file; 0: there is no room for it now."""
        position = self._positions.get(key)
        if position is None:
            if time.monotonic() < self._retry_at or not self._placed(key):
                return 0
            position = self._positions[key]
        return position

    def _placed(self, key: str) -> bool:
        """Make the file, and give `key` a place in it; whether there is room."""
        try:
            if not self._opened:
                self._open()
            if key and key not in self._positions:
                self._init_value(key)
        except OSError as error:
            if not AllocatedDict._retry_at:
                _log.error(
                    "cannot keep metrics in %s: %s: those without room are not seen until there is",
                    os.path.abspath(self._name),
                    error.strerror,
                )
            AllocatedDict._retry_at = time.monotonic() + _RETRY_S
            return False
        return True

    def _open(self) -> None:
        if not os.path.exists(self._name):
            # Under another name first: who reads all files must not find one that is empty.
            new = f"{self._name}.new"
            try:
                with open(new, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, _INITIAL_MMAP_SIZE)
                os.rename(new, self._name)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(new)
                raise
        super().__init__(self._name)  # type: ignore[no-untyped-call]
        self._opened = True

    def _init_value(self, key: str) -> None:
        # An entry is its key in UTF-8, padded, and 28 bytes at most beside it.
        if self._used + len(key.encode()) + 28 > self._capacity:
            os.posix_fallocate(self._f.fileno(), 0, 2 * self._capacity)
        super()._init_value(key)  # type: ignore[no-untyped-call]


class FileValue:
    """A value of a process with one thread, which never forks, in PROMETHEUS_MULTIPROC_DIR: what
    `prometheus_client.values.ValueClass` is to be there."""

    _files: ClassVar[dict[str, AllocatedDict]] = {}

    def __init__(
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Sequence[str],
        labelvalues: Sequence[str],
        help_text: str,
        multiprocess_mode: str = "",
        **_: object,
    ) -> None:
        kind = f"gauge_{multiprocess_mode}" if typ == "gauge" else typ
        if kind not in self._files:
            directory = os.environ["PROMETHEUS_MULTIPROC_DIR"]
            self._files[kind] = AllocatedDict(f"{directory}/{kind}_{os.getpid()}.db")
        self._file = self._files[kind]
        self._key = mmap_key(metric_name, name, list(labelnames), list(labelvalues), help_text)
        self._value, _time = self._file.read_value(self._key)
        self._position = 0  # in the file, once it has one

    def inc(self, amount: float) -> None:
        self._value += amount
        if self._position:  # as `_write`, of which there are several for each request
            _pack_into(self._file._m, self._position, self._value, 0.0)
        else:
            self._write(0.0)

    def set(self, value: float, timestamp: float | None = None) -> None:
        self._value = value
        self._write(timestamp or 0.0)

    def _write(self, timestamp: float) -> None:
        if not self._position:
            self._position = self._file.place(self._key)
        if self._position:
            _pack_into(self._file._m, self._position, self._value, timestamp)

    def get(self) -> float:
        return self._value
