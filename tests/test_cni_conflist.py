"""Our entry in other plugins' files: put in, kept, taken out; nothing of theirs is lost."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from mesh.cni import conflist, shim
from mesh.cni.install import Installation

OURS = {"type": "weft-cni", "weftSocket": "/run/weft/cni.sock"}
BRIDGE = {"type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local"}}
PORTS = {"type": "portmap", "capabilities": {"portMappings": True}}
ABOUT = {"cniVersion": "1.0.0", "name": "net"}


def as_list(*plugins, **more):
    return {**ABOUT, **more, "plugins": list(plugins)}


def write(directory, name, content):
    text = content if isinstance(content, str) else json.dumps(content, indent=1)
    (directory / name).write_text(text)


def texts(directory):
    return {one.name: one.read_text() for one in directory.iterdir()}


def read(directory):
    return {one.name: json.loads(one.read_text()) for one in directory.iterdir()}


def test_ours_ends_the_first_list_and_goes_again(tmp_path):
    write(tmp_path, "10-net.conflist", as_list(BRIDGE, PORTS, disableCheck=True))
    write(tmp_path, "20-other.conf", {**ABOUT, **BRIDGE})
    (tmp_path / "10-net.conflist").chmod(0o600)
    before = read(tmp_path)
    other = (tmp_path / "20-other.conf").read_bytes()
    for _ in range(2):
        assert conflist.put_in(tmp_path, OURS) == []
        wanted = as_list(BRIDGE, PORTS, OURS, disableCheck=True)
        assert read(tmp_path) == {**before, "10-net.conflist": wanted}
    assert (tmp_path / "10-net.conflist").stat().st_mode & 0o777 == 0o600
    # Another socket, and somebody has put a plugin behind ours.
    write(tmp_path, "10-net.conflist", as_list(BRIDGE, {**OURS, "weftSocket": "/x"}, PORTS))
    assert conflist.put_in(tmp_path, OURS) == []
    assert read(tmp_path)["10-net.conflist"] == as_list(BRIDGE, PORTS, OURS)
    assert conflist.take_out(tmp_path) == []
    assert read(tmp_path) == {**before, "10-net.conflist": as_list(BRIDGE, PORTS)}
    assert (tmp_path / "20-other.conf").read_bytes() == other


def test_what_is_in_its_place_is_not_written_again(tmp_path):
    write(tmp_path, "10-net.conflist", as_list(BRIDGE, OURS))
    before = (tmp_path / "10-net.conflist").stat()
    assert conflist.put_in(tmp_path, OURS) == []
    assert (tmp_path / "10-net.conflist").stat() == before


@pytest.mark.parametrize("suffix", ["conf", "json"])
def test_a_single_plugin_becomes_a_list_and_is_as_it_was_again(tmp_path, suffix):
    name = f"10-net.{suffix}"
    write(tmp_path, name, {**ABOUT, **BRIDGE})
    before = texts(tmp_path)
    assert conflist.put_in(tmp_path, OURS) == []
    wanted = {
        "10-net.conflist": as_list({**ABOUT, **BRIDGE}, OURS),
        f"{name}.weft": {**ABOUT, **BRIDGE},
    }
    assert read(tmp_path) == wanted
    # Its plugin writes it anew.
    newer = {**ABOUT, **BRIDGE, "mtu": 1400}
    write(tmp_path, name, newer)
    assert conflist.put_in(tmp_path, OURS) == []
    assert read(tmp_path) == {"10-net.conflist": as_list(newer, OURS), f"{name}.weft": newer}
    write(tmp_path, name, {**ABOUT, **BRIDGE})
    assert conflist.put_in(tmp_path, OURS) == []
    assert conflist.take_out(tmp_path) == []
    assert texts(tmp_path) == {name: json.dumps({**ABOUT, **BRIDGE}, indent=1)} == before


def test_a_list_that_somebody_has_changed_stays_changed(tmp_path):
    write(tmp_path, "10-net.conf", {**ABOUT, **BRIDGE})
    assert conflist.put_in(tmp_path, OURS) == []
    write(tmp_path, "10-net.conflist", as_list(BRIDGE, PORTS, OURS))
    assert conflist.take_out(tmp_path) == []
    assert read(tmp_path)["10-net.conflist"] == as_list(BRIDGE, PORTS)
    assert read(tmp_path)["10-net.conf.weft"] == {**ABOUT, **BRIDGE}


def test_a_new_first_one(tmp_path):
    for first in ("10-net.conf", "10-net.conflist"):
        directory = tmp_path / first
        directory.mkdir()
        write(directory, first, {**ABOUT, **BRIDGE} if first.endswith("f") else as_list(BRIDGE))
        before = read(directory)
        assert conflist.put_in(directory, OURS) == []
        write(directory, "05-new.conflist", as_list(PORTS))
        assert conflist.put_in(directory, OURS) == []
        assert read(directory) == {**before, "05-new.conflist": as_list(PORTS, OURS)}


def test_broken_and_foreign_files_are_passed_over_and_told_of(tmp_path):
    broken = {
        "01.conflist": "{",
        "02.conflist": as_list({"bridge": "cni0"}),
        "03.conflist": as_list(),
        "04.conf": as_list(BRIDGE),
        "05.conf": {**BRIDGE, "cniVersion": "1.0.0"},
        "06.conflist": b"\xff\xfe".decode("latin1"),
        "07.json": "[]",
    }
    for name, content in broken.items():
        write(tmp_path, name, content)
    write(tmp_path, "notes.txt", "weft-cni")
    before = texts(tmp_path)
    write(tmp_path, "10-net.conflist", as_list(BRIDGE))
    problems = conflist.put_in(tmp_path, OURS)
    assert [one.partition(": ")[0] for one in problems] == [str(tmp_path / name) for name in broken]
    assert "plugins[0]" in problems[1]
    assert "`name`" in problems[4]
    assert read_one(tmp_path) == as_list(BRIDGE, OURS)
    assert {name: text for name, text in texts(tmp_path).items() if name in before} == before
    # Our entry in what cannot be read: the executable has to stay.
    write(tmp_path, "02.conflist", '{"plugins": [{"type": "weft-cni"}, ')
    (left,) = conflist.take_out(tmp_path)
    assert left.startswith(str(tmp_path / "02.conflist"))
    assert read_one(tmp_path) == as_list(BRIDGE)


def read_one(directory):
    return json.loads((directory / "10-net.conflist").read_text())


def test_what_cannot_be_joined(tmp_path):
    (nothing,) = conflist.put_in(tmp_path, OURS)
    assert "no network is configured" in nothing
    write(tmp_path, "10-net.conf", {**BRIDGE, "name": "net", "cniVersion": "0.2.0"})
    before = texts(tmp_path)
    (why,) = conflist.put_in(tmp_path, OURS)
    assert why.startswith(f"{tmp_path}/10-net.conf: cniVersion: 0.2.0")
    write(tmp_path, "10-net.conf", {**ABOUT, **BRIDGE})
    write(tmp_path, "10-net.conflist", as_list(PORTS))
    before = texts(tmp_path)
    (why,) = conflist.put_in(tmp_path, OURS)
    assert "remove one of them" in why
    assert texts(tmp_path) == before


async def test_it_is_kept_on_a_node_and_taken_away(tmp_path):
    """By who watches the directory."""
    conf, bin_dir = tmp_path / "net.d", tmp_path / "bin"
    conf.mkdir()
    bin_dir.mkdir()
    write(conf, "20-net.conflist", as_list(BRIDGE))
    shim.build()
    renewed = asyncio.Event()
    installation = Installation(bin_dir, conf, Path(OURS["weftSocket"]), renewed.set)
    task = asyncio.ensure_future(installation.run())

    async def until(holds):
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.005)

    def listed(name):
        return json.loads((conf / name).read_text())

    try:
        await renewed.wait()
        assert (bin_dir / "weft-cni").read_bytes() == shim.PROGRAM.read_bytes()
        assert os.access(bin_dir / "weft-cni", os.X_OK)
        assert listed("20-net.conflist") == as_list(BRIDGE, OURS)
        # A new first one; its plugin writes it anew in two halves, and the other stays as it is.
        write(conf, "10-net.conflist", as_list(PORTS))
        await until(lambda: listed("10-net.conflist") == as_list(PORTS, OURS))
        assert listed("20-net.conflist") == as_list(BRIDGE)
        before = (conf / "20-net.conflist").stat().st_ino
        renewed.clear()
        whole = json.dumps(as_list(PORTS))
        with open(conf / "10-net.conflist", "w") as file:
            file.write(whole[:20])
            file.flush()
            await asyncio.sleep(0.05)  # it is read meanwhile, or not: there is nothing to see of it
            file.write(whole[20:])
        await renewed.wait()
        assert installation.problems == []
        assert (conf / "20-net.conflist").stat().st_ino == before
        # What stays broken is told of.
        write(conf, "05-net.conflist", "{")
        await until(lambda: installation.problems)
        (conf / "05-net.conflist").unlink()
        await until(lambda: not installation.problems)
        assert listed("10-net.conflist") == as_list(PORTS, OURS)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    before = (bin_dir / "weft-cni").stat().st_ino
    installation.remove(needed=True)
    assert read(conf) == {"10-net.conflist": as_list(PORTS), "20-net.conflist": as_list(BRIDGE)}
    assert (bin_dir / "weft-cni").stat().st_ino == before
    installation.remove(needed=False)
    assert list(bin_dir.iterdir()) == []
    # Where a list that cannot be mended names it, it has to stay.
    (bin_dir / "weft-cni").touch()
    write(conf, "10-net.conflist", '{"plugins": [{"type": "weft-cni"}]')
    installation.remove(needed=False)
    assert (bin_dir / "weft-cni").exists()
