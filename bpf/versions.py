"""What other versions of Weft left in the pin directory: maps of other layouts, and programs.

Until this version's programs are in their place they decide, and sockets that are in their maps
stay there until they close.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from bpf import constants, layout, pins, syscall
from bpf.attach import opened
from bpf.errors import DatapathError
from bpf.maps import MAPS, PinnedMap, open_pinned
from bpf.structs import Config, Number

# By tuple and by socket cookie; both forget what has not been used for long.
_OF_CONNECTIONS = ("flows", "origins")
_SOCKETS = ("workload_sockets", "proxy_sockets")


def retire(directory: Path) -> bool:
    """Lets go of versions whose sockets have all closed; whether there were any. Only once none of
    their programs is attached. OSError."""
    idle = [
        version
        for version in pins.other_versions(directory)
        if not any(_has_sockets(pins.map_path(directory, name, version)) for name in _SOCKETS)
    ]
    for version in idle:
        pins.remove_version(directory, version)
    return bool(idle)


def stop_redirects(directory: Path, which: Iterable[str]) -> None:
    """No socket is enrolled from now on by programs of these versions; those that are stay so. One
    whose configuration has another size is left alone. OSError."""
    for version in which:
        try:
            config = PinnedMap(directory, "config", Number, Config, version)
        except DatapathError:
            continue
        with contextlib.closing(config):
            before = config.get(Number(0))
            if before is not None and before.flags & constants.CONFIG_SOCKMAP:
                flags = before.flags & ~constants.CONFIG_SOCKMAP
                config.put(Number(0), before._replace(flags=flags))


def take_over(directory: Path) -> None:
    """What programs of other versions know of open connections, for this one's, unless they know it
    already: filters judge them anew, but do not take answers for openings; sockets go on being told
    whom they asked for. What has another size stays behind. DatapathError, OSError."""
    for name in _OF_CONNECTIONS:
        spec = MAPS[name]
        assert spec.key is not None
        assert spec.value is not None
        with opened(open_pinned(directory, name)) as own:
            for version in pins.other_versions(directory):
                with contextlib.suppress(DatapathError):
                    _copy(
                        open_pinned(directory, name, version), own, spec.key.size, spec.value.size
                    )


def _copy(theirs: int, own: int, *sizes: int) -> None:
    with opened(theirs):
        known = {key for key, _ in syscall.entries(own, *sizes)}
        fresh = [one for one in syscall.entries(theirs, *sizes) if one[0] not in known]
    if fresh:
        keys, values = (b"".join(parts) for parts in zip(*fresh, strict=True))
        syscall.update_batch(own, keys, values, len(fresh))


def _has_sockets(path: Path) -> bool:
    try:
        fd = syscall.pinned(str(path))
    except FileNotFoundError:
        return False
    with opened(fd):
        return syscall.next_key(fd, None, layout.U64.size) is not None
