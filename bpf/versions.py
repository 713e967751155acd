"""What other versions of Weft left in the pin directory: maps of other layouts, and programs.

Until this version's programs are in their place they decide, and sockets that are in their maps
stay there until they close.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from bpf import layout, pins, syscall
from bpf.attach import opened
from bpf.errors import DatapathError
from bpf.layout import Config, Number
from bpf.maps import PinnedMap, open_pinned

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
            if before is not None and before.flags & layout.CONFIG_SOCKMAP:
                flags = before.flags & ~layout.CONFIG_SOCKMAP
                config.put(Number(0), before._replace(flags=flags))


def take_over_flows(directory: Path) -> None:
    """What filters of other versions know of open connections, for this one's, unless it knows it
    already: it judges them anew, but does not take answers for openings. DatapathError, OSError."""
    sizes = layout.FLOW_KEY.size, layout.FLOW.size
    with opened(open_pinned(directory, "flows")) as own:
        for version in pins.other_versions(directory):
            try:
                theirs = open_pinned(directory, "flows", version)
            except DatapathError:
                continue
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
