"""What requests that pass by the proxy are counted under in the kernel: numbers and their meaning.

A worker offers a connection to the kernel under the number of a series: the route, both ends and
their policies. What the number means it writes to a file beside those of its metrics first, so that
the agent can tell what the kernel has counted, also when the worker is gone. No bpf.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mesh.model.flow import Encryption

_log = logging.getLogger("weft.series")

# Of a worker, in its life: past that requests go through the proxy.
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


class SeriesNumbers:
    """A worker's. Numbers are nobody else's, of other versions and nodes' lives neither."""

    def __init__(self, directory: str | None) -> None:
        """`directory`: of the metrics; None: nothing is counted, and nothing passes."""
        self._path = f"{directory}/passed_{os.getpid()}.jsonl" if directory is not None else ""
        self._known: dict[Series, int] = {}
        self._fd = -1
        self._base = int.from_bytes(os.urandom(5), "big") << 24

    def number(self, series: Series) -> int | None:
        """None: it cannot be written down."""
        known = self._known.get(series)
        if known is not None or not self._path or len(self._known) >= _MAX_SERIES:
            return known
        number = self._base + len(self._known)
        line = msgspec.json.encode(_Line(number, series)) + b"\n"
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
            return None
        self._known[series] = number
        return number


class SeriesReader:
    """Those of all workers, dead ones too."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[int, Series] = {}
        self._read: dict[Path, int] = {}
        self._decoder = msgspec.json.Decoder(_Line)

    def get(self, number: int) -> Series | None:
        """None: nobody has it (any more)."""
        found = self._known.get(number)
        if found is None:
            self._known.update(self._new())
            found = self._known.get(number)
        return found

    def _new(self) -> Iterator[tuple[int, Series]]:
        for path in self._directory.glob(_FILES):
            at = self._read.get(path, 0)
            with open(path, "rb") as file:
                file.seek(at)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = at + len(whole)
            for line in whole.splitlines():
                try:
                    read = self._decoder.decode(line)
                except msgspec.DecodeError as error:
                    _log.error("%s: a line is not a series: %s", path, error)
                    continue
                yield read.number, read.series
