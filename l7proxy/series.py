"""What requests that pass by the proxy are counted under in the kernel: numbers and their meaning.

A worker offers a connection to the kernel under the number of a series: the route, both ends and
their policies. What the number means it writes to a file beside those of its metrics first, so that
the agent can tell what the kernel has counted, also when the worker is gone. No bpf.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from mesh.model.flow import Encryption

_log = logging.getLogger("weft.series")

# Of a worker, at once: past that requests go through the proxy.
_MAX_SERIES = 20_000
_FILES = "passed_*.jsonl"


class Series(msgspec.Struct, frozen=True, omit_defaults=True):
    """As in the access log; `address`, `port` and `pod` are the endpoint's. `egress`, `ingress`:
    the sources of the policy rules that may let a request pass, by number; number 0 is that of the
    one that lets all pass ("": no policy had to)."""

    gateway: str
    listener: str
    route: str
    rule: str
    service: str
    backend: str
    endpoint: str
    client: str
    address: str
    port: int
    pod: str = ""
    client_identity: str = ""
    endpoint_identity: str = ""
    encryption: Encryption = "none"
    egress: tuple[str, ...] = ("",)
    ingress: tuple[str, ...] = ("",)

    def policy(self, egress: int, ingress: int) -> str:
        """What has let a request pass, as `l7proxy.policies` tells it."""
        return _numbered(self.ingress, ingress) or _numbered(self.egress, egress)


def _numbered(sources: tuple[str, ...], number: int) -> str:
    return sources[number] if number < len(sources) else ""


class _Line(msgspec.Struct, frozen=True):
    number: int
    series: Series


class Numbered:
    """A number, for as long as somebody holds this. `meaning`: its series."""

    __slots__ = ("__weakref__", "meaning", "number")

    def __init__(self, number: int, meaning: Series) -> None:
        self.number = number
        self.meaning = meaning


class SeriesNumbers:
    """A worker's. Numbers are nobody else's, of other versions and nodes' lives neither."""

    def __init__(self, directory: str | None, limit: int = _MAX_SERIES) -> None:
        """`directory`: of the metrics; None: nothing is counted, and nothing passes."""
        self._path = f"{directory}/passed_{os.getpid()}.jsonl" if directory is not None else ""
        self._limit = limit
        self._numbers: dict[Series, int] = {}
        self._held = WeakValueDictionary[int, Numbered]()
        self._unused: set[int] = set()  # when this was last asked for
        self._fd = -1
        self._next = int.from_bytes(os.urandom(5), "big") << 24
        self.full = False

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def many(self) -> bool:
        """It is time to look for some that nobody uses."""
        return len(self._numbers) >= self._limit // 2

    def number(self, series: Series) -> Numbered | None:
        """None: it cannot be written down, or there are too many (`full`)."""
        number = self._numbers.get(series)
        if number is None:
            if len(self._numbers) >= self._limit:
                if not self.full:
                    _log.warning(
                        "there are %d series already to count requests in the kernel under: "
                        "further ones go through the proxy until some have ended",
                        self._limit,
                    )
                self.full = True
                return None
            number = self._next
            if not self._path or not self._write(_line(number, series)):
                return None
            self._next += 1
            self._numbers[series] = number
        self._unused.discard(number)
        found = self._held.get(number)
        if found is None:
            found = self._held[number] = Numbered(number, series)
        return found

    def _write(self, line: bytes) -> bool:
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            # What was cut short before is no line, nor is this one then.
            whole = os.write(self._fd, line) == len(line)
        except OSError as error:
            _log.error("cannot write %s: %s", self._path, error.strerror)
            whole = False
        if not whole:
            self._path = ""
        return whole

    def unused(self) -> dict[int, Series]:
        """Those that nobody has held, now and when this was last asked for."""
        unused = {one for one in self._numbers.values() if one not in self._held}
        before, self._unused = self._unused, unused
        return {
            number: series
            for series, number in self._numbers.items()
            if number in before and number in unused
        }

    async def forget(self, unused: Collection[int]) -> None:
        """Let numbers go that nobody has held since, and on which nothing is counted any more."""
        if not self._path:
            return
        unused = self._unused.intersection(unused)
        self._numbers = {
            series: number
            for series, number in self._numbers.items()
            if number not in unused or number in self._held
        }
        self.full = len(self._numbers) >= self._limit
        kept = list(self._numbers.items())
        new = f"{self._path}.new"
        try:
            await asyncio.to_thread(_write_all, new, kept)
            fd = os.open(new, os.O_WRONLY | os.O_APPEND)
            more = list(self._numbers.items())[len(kept) :]
            os.write(fd, b"".join(_line(number, series) for series, number in more))
            os.rename(new, self._path)
        except OSError as error:  # the others stay in the file as well
            _log.error("cannot write %s: %s", new, error.strerror)
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd


def _line(number: int, series: Series) -> bytes:
    return msgspec.json.encode(_Line(number, series)) + b"\n"


def _write_all(path: str, numbers: Iterable[tuple[Series, int]]) -> None:
    with open(path, "wb") as file:
        file.writelines(_line(number, series) for series, number in numbers)


class _Read:
    """A file, as far as it was read. `number`: its inode's."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.size = 0
        self.known: dict[int, Series] = {}


class SeriesReader:
    """Those of all workers, dead ones too."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[Path, _Read] = {}
        self._decoder = msgspec.json.Decoder(_Line)

    def get(self, number: int) -> Series | None:
        """None: nobody has it (any more)."""
        found = self._find(number)
        if found is None:
            for path in self._directory.glob(_FILES):
                self._read(path)
            found = self._find(number)
        return found

    def _find(self, number: int) -> Series | None:
        known = (one.known.get(number) for one in self._files.values())
        return next((one for one in known if one is not None), None)

    def _read(self, path: Path) -> None:
        with open(path, "rb") as file:
            number = os.fstat(file.fileno()).st_ino
            read = self._files.get(path)
            if read is None or read.number != number:
                read = self._files[path] = _Read(number)
            file.seek(read.size)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        read.size += len(whole)
        for line in whole.splitlines():
            try:
                one = self._decoder.decode(line)
            except msgspec.DecodeError as error:
                _log.error("%s: a line is not a series: %s", path, error)
                continue
            read.known[one.number] = one.series
