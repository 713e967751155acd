"""Compiled programs are kept: used again where they are ours, and never where they may not be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from bpf_world import ROOT, needs_bpf

from bpf.loader import create
from bpf.objects import Objects, objects
from bpf.syscall import map_info

pytestmark = needs_bpf


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The name of the file, and what is in it."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEFT_CACHE", str(directory / "weft"))
        made = objects()
    (file,) = (directory / "weft").iterdir()
    assert msgspec.msgpack.decode(file.read_bytes(), type=Objects) == made
    return file.name, file.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, compiled: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that holds what nobody would compile: no programs."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    made = msgspec.msgpack.decode(compiled[1], type=Objects)
    (tmp_path / compiled[0]).write_bytes(msgspec.msgpack.encode(Objects(made.maps, {})))
    return tmp_path


def test_what_is_kept_is_used(cache: Path) -> None:
    assert not objects().programs


@pytest.mark.parametrize("path", ["directory", "file"])
def test_what_others_can_write_to_is_not(
    cache: Path, compiled: tuple[str, bytes], path: str
) -> None:
    (cache if path == "directory" else cache / compiled[0]).chmod(0o722)
    assert objects().programs


def test_what_is_another_users_is_not(cache: Path, compiled: tuple[str, bytes]) -> None:
    os.chown(cache / compiled[0], 65534, -1)
    assert objects().programs


def test_what_cannot_be_read_is_compiled_anew(cache: Path, compiled: tuple[str, bytes]) -> None:
    """And comes out the same where kernel symbols are not seen, as in a container."""
    (cache / compiled[0]).write_bytes(compiled[1][:1000])
    program = "from bpf.objects import objects; objects()"
    command = ["setpriv", "--bounding-set=-syslog", sys.executable, "-c", program]
    subprocess.run(command, check=True, cwd=ROOT)
    assert (cache / compiled[0]).read_bytes() == compiled[1]


def test_maps_are_made_as_they_were_declared(compiled: tuple[str, bytes]) -> None:
    made = msgspec.msgpack.decode(compiled[1], type=Objects)
    for name, info in made.maps.items():
        fd = create(name, info)
        assert map_info(fd) == info, name
        os.close(fd)
