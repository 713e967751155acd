"""Weft's place in the lists of plugins that container runtimes read: put in at the end of the first
one, taken out again.

Runtimes read `*.conf`, `*.conflist` and `*.json` by name, and take the first. A file that is one
plugin becomes a list of it and ours; the file itself waits beside that under another name
(BESIDE). Every step leaves a directory that a runtime can use, and each file is whole at any time.
What cannot be read is left alone and told of. Knows files, not what is on the node beside them.

Source: CNI specification 1.1.0, section 1; libcni's ConfFiles, NetworkConfFromFile and
ConfListFromConf.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mesh.cni.plugin import VERSIONS

TYPE = "weft-cni"
# Of a single plugin's file while a list has its place: no runtime reads this.
BESIDE = ".weft"
_LIST = ".conflist"
_SUFFIXES = (".conf", ".json", _LIST)


class _Plugin(msgspec.Struct):
    type: str


class _List(msgspec.Struct, rename={"version": "cniVersion"}):
    name: str
    plugins: list[_Plugin]
    version: str = "0.1.0"


class _Single(_Plugin, rename={"version": "cniVersion"}):
    name: str
    version: str = "0.1.0"


class _Network(NamedTuple):
    """A file that a runtime can use, as a list. `single`: it is one plugin."""

    path: Path
    content: dict[str, Any]
    single: bool

    @property
    def ours(self) -> list[dict[str, Any]]:
        return [one for one in self.content["plugins"] if one["type"] == TYPE]

    def ending(self, *more: dict[str, Any]) -> dict[str, Any]:
        """The list with these in the place of ours."""
        others = [one for one in self.content["plugins"] if one["type"] != TYPE]
        return {**self.content, "plugins": [*others, *more]}


def put_in(directory: Path, entry: dict[str, Any]) -> list[str]:
    """See that `entry` (of TYPE) ends the first list, and is in no other. What is in the way, by
    file and field; OSError."""
    networks, problems = _networks(directory)
    if not networks:
        return [*problems, f"{directory}: no network is configured there yet: install a CNI plugin"]
    first, *others = networks
    version = first.content.get("cniVersion", "0.1.0")
    if version not in VERSIONS:
        problems.append(
            f"{first.path}: cniVersion: {version} hands no results from plugin to plugin: raise it "
            f"to {VERSIONS[-2]}, where its plugins can do that"
        )
    else:
        target = first.path.with_suffix(_LIST)
        taken = [one for one in others if one.path == target and not one.ours]
        if first.single and taken:
            problems.append(
                f"{first.path}: is one plugin, and {target}, which it would have to become, is "
                "there: remove one of them"
            )
        else:
            wanted = first.ending(entry)
            if first.single or first.content != wanted:
                _write(target, wanted, like=first.path)
            if first.single:
                first.path.rename(_beside(first.path))
            others = [one for one in others if one.path != target]
    for one in others:
        _strip(one)
    return problems


def first(directory: Path) -> tuple[Path, list[str]] | None:
    """The file that a runtime takes, and the types of its plugins. OSError."""
    networks, _ = _networks(directory)
    if not networks:
        return None
    return networks[0].path, [one["type"] for one in networks[0].content["plugins"]]


def unreadable(directory: Path) -> list[str]:
    """What no runtime can use, by file and field. OSError."""
    return _networks(directory)[1]


def take_out(directory: Path) -> list[str]:
    """Ours out of all lists, and files that became lists as they were. What could not be done, by
    file and field: a runtime may still start our plugin then. OSError."""
    networks, problems = _networks(directory)
    for one in networks:
        _strip(one)
    return [why for why in problems if TYPE.encode() in Path(why.partition(": ")[0]).read_bytes()]


def _strip(network: _Network) -> None:
    if not network.ours:
        return
    without = network.ending()
    for suffix in _SUFFIXES[:2]:
        single = network.path.with_suffix(suffix)
        beside = _beside(single)
        if beside.exists() and without == _as_list(json.loads(beside.read_bytes())):
            # A newer one may have come meanwhile.
            if single.exists():
                beside.unlink()
            else:
                beside.rename(single)
            network.path.unlink()
            return
    _write(network.path, without, like=network.path)


def _networks(directory: Path) -> tuple[list[_Network], list[str]]:
    """What a runtime can use, the first one first, and what it cannot."""
    found, problems = [], []
    for path in sorted(directory.iterdir()):
        if path.suffix not in _SUFFIXES or path.is_dir():
            continue
        try:
            content = json.loads(path.read_bytes())
            if path.suffix == _LIST:
                if not msgspec.convert(content, _List).plugins:
                    raise ValueError("plugins: there are none")
                found.append(_Network(path, content, single=False))
            else:
                msgspec.convert(content, _Single)
                found.append(_Network(path, _as_list(content), single=True))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{path}: no network that a runtime can use, passed over: {error}")
    # One that is written anew comes before the list that was made of it.
    found.sort(key=_rank)
    return found, problems


def _rank(network: _Network) -> tuple[Path, bool]:
    anew = network.single and _beside(network.path).exists()
    return (network.path.with_suffix(_LIST) if anew else network.path), not anew


def _as_list(plugin: dict[str, Any]) -> dict[str, Any]:
    content = {key: plugin[key] for key in plugin if key in ("cniVersion", "name")}
    return {**content, "plugins": [plugin]}


def _beside(path: Path) -> Path:
    return path.with_name(path.name + BESIDE)


def _write(path: Path, content: dict[str, Any], *, like: Path) -> None:
    """In the place of what may be there, at once, with the mode of another file."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace(path.resolve(), text.encode(), like.stat().st_mode & 0o777)


def replace(path: Path, data: bytes, mode: int) -> None:
    """A file's content, all at once, also for who loses power. OSError."""
    draft = path.with_name(f".{path.name}~")
    with open(draft, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
