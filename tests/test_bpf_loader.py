"""The loader and the pins: layouts, errors, and that nothing stays behind."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from bpf_world import (
    ROOT,
    TIMEOUT_S,
    cgroup_mount,
    loader,
    needs_bpf,
    new_cgroup,
    pin_directory,
    steered,
)

from bpf import constants, layout, maps, pins, reasons, syscall
from bpf.balancer import Balancer
from bpf.errors import DatapathError
from bpf.programs import PROGRAMS
from bpf.reasons import Reason
from bpf.structs import Backend, Frontend, Member, Number, Target
from mesh.model.nodeconfig import EntryBackend, LoadBalancerEntry

NOBODY = 65534


# --- without a kernel -----------------------------------------------------------------------------


def test_reasons_are_numbered_without_gaps():
    assert [int(reason) for reason in Reason] == list(range(len(Reason)))


def test_every_reason_is_used_in_c():
    programs = (ROOT / "bpf" / "programs").iterdir()
    text = "\n".join(path.read_text() for path in programs)
    for reason in Reason:
        used = rf"REFUSE\({reason.name}\)|\bREASON_{reason.name}\b"
        assert re.search(used, text), reason.name


def test_targets_in_bytes():
    target = Target.of("10.1.2.3", 8080, "TCP")
    packed = layout.TARGET.pack(target)
    assert packed == bytes(10) + b"\xff\xff\x0a\x01\x02\x03" + b"\x1f\x90" + b"\x06" + b"\0"
    assert layout.TARGET.unpack(Target, packed) == target
    assert Target.of("::ffff:10.1.2.3", 8080, "TCP") == target
    v6 = Target.of("fd00::1", 53, "UDP")
    assert v6 == Target(socket.inet_pton(socket.AF_INET6, "fd00::1"), 53, socket.IPPROTO_UDP)
    assert target.is_ipv4
    assert not v6.is_ipv4


@pytest.mark.parametrize("address", ["x", "example.com", "10.1.2", "fe80::1%eth0"])
def test_no_targets(address):
    with pytest.raises(ValueError, match=address):
        Target.of(address, 80, "TCP")


# --- with one -------------------------------------------------------------------------------------


def verified(program: Path) -> int:
    """How many instructions the verifier has looked at (struct bpf_prog_info, verified_insns)."""
    fd = syscall.pinned(str(program))
    info = ctypes.create_string_buffer(220)
    syscall._bpf(syscall._INFO_BY_FD, "=IIQ", fd, len(info), ctypes.addressof(info))
    os.close(fd)
    found: int = struct.unpack_from("=I", info, 216)[0]
    return found


@needs_bpf
def test_everything_is_pinned_and_nothing_stays(tmp_path):
    with new_cgroup() as cgroup:
        pin = tmp_path / "run" / "pins"
        done = loader("--pin", pin, "--cgroup", cgroup)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.path.ismount(pin)
        # Of the million steps that the verifier takes.
        steps = {name: verified(pins.program_path(pin, name)) for name in PROGRAMS}
        assert max(steps.values()) < 100_000, steps
        assert {path.name for path in pins.map_path(pin, "x").parent.iterdir()} == set(maps.MAPS)
        links = {path.name for path in (pin / "links").rglob("*")}
        assert {"connect4", "connect6", "sendmsg4", "recvmsg6", "getpeername4"} < links
        done = loader("--pin", pin, "--remove")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not pin.exists()
        assert loader("--pin", pin, "--remove").returncode == 0


@needs_bpf
@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("target", {"address": "16s", "port": "I", "protocol": "B"}, "size of struct target"),
        (
            "frontend",
            {"size": "I", "offset": "I", "affinity_s": "I"},
            "offset of struct frontend.offset",
        ),
    ],
)
def test_layouts_that_differ_do_not_compile(name, fields, message):
    """In a process of its own, where Python has another idea of the struct than C."""
    code = (
        "from pathlib import Path\n"
        "from bpf import layout\n"
        "from bpf.compiler import Module\n"
        "layout.Layout.all.clear()\n"
        f"layout.Layout({name!r}, '=', {fields!r})\n"
        "Module(Path('bpf/programs/datapath.c'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 1
    assert "static_assert failed" in done.stderr
    assert message in done.stderr


@needs_bpf
def test_the_root_is_never_steered(tmp_path):
    done = loader("--pin", tmp_path / "pins", "--cgroup", cgroup_mount())
    assert done.returncode == 1
    assert "root of cgroup v2: the hooks would catch every process" in done.stderr
    assert not (tmp_path / "pins").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_only_cgroups_are_steered(tmp_path):
    done = loader("--pin", tmp_path / "pins", "--cgroup", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} is not a cgroup v2 directory" in done.stderr


@needs_bpf
def test_a_directory_in_use_is_not_mounted_over(tmp_path):
    (tmp_path / "precious").touch()
    with new_cgroup() as cgroup:
        done = loader("--pin", tmp_path, "--cgroup", cgroup)
    assert done.returncode == 1
    assert f"{tmp_path} has files in it and is no bpffs" in done.stderr
    assert not os.path.ismount(tmp_path)


@needs_bpf
def test_only_pins_are_removed(tmp_path):
    precious = tmp_path / "maps" / "precious"
    precious.parent.mkdir()
    precious.touch()
    done = loader("--pin", tmp_path, "--remove")
    assert done.returncode == 1
    assert f"cannot remove the pin directory {tmp_path}: Directory not empty" in done.stderr
    assert precious.exists()


@needs_bpf
def test_a_mount_of_others_stays(tmp_path):
    """Pins below a bpffs that is already there, in a directory with a blank in its name."""
    with new_cgroup() as cgroup, pin_directory(tmp_path / "a b") as mounted:
        pins.prepare(mounted)
        pin = mounted / "node"
        assert loader("--pin", pin, "--cgroup", cgroup).returncode == 0
        assert not os.path.ismount(pin)
        assert loader("--pin", pin, "--remove").returncode == 0
        assert not pin.exists()
        assert os.path.ismount(mounted)
    assert not mounted.exists()


@needs_bpf
def test_without_rights_it_says_so(tmp_path):
    with new_cgroup() as cgroup:
        done = subprocess.run(
            [sys.executable, "-m", "bpf.loader", "--pin", tmp_path / "x", "--cgroup", cgroup],
            cwd=ROOT,
            user=NOBODY,
            group=NOBODY,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode == 1
    assert "run as root" in done.stderr or "takes root" in done.stderr
    assert "Traceback" not in done.stderr


@needs_bpf
def test_the_verifier_is_quoted():
    # r0 is never set: BPF_EXIT alone.
    with pytest.raises(syscall.VerifierError) as caught:
        syscall.load_program("nothing", 18, 10, b"\x95" + bytes(7), "GPL")
    assert "R0 !read_ok" in caught.value.log


@needs_bpf
def test_maps_of_another_version_are_not_adopted(tmp_path):
    with new_cgroup() as cgroup, pin_directory(tmp_path) as pin:
        assert loader("--pin", pin, "--cgroup", cgroup).returncode == 0
        other, path = pins.map_path(pin, "backends"), pins.map_path(pin, "frontends")
        path.unlink()
        syscall.pin(syscall.pinned(str(other)), str(path))
        done = loader("--pin", pin, "--cgroup", cgroup)
        assert done.returncode == 1
        assert f"the map pinned at {path} is not what its version says" in done.stderr
        with pytest.raises(DatapathError, match="another version"):
            Balancer(pin)


def test_maps_that_are_not_there(tmp_path):
    with pytest.raises(DatapathError, match=r"no map at .*/frontends.*bpf\.loader"):
        Balancer(tmp_path)


@needs_bpf
def test_maps_and_refused_entries(tmp_path):
    with steered(tmp_path) as (pin, _, _):
        table = maps.PinnedMap(pin, "frontends", Target, Frontend)
        ones = {Target.of("10.0.0.1", port, "TCP"): Frontend(port, 0, 0) for port in range(1, 50)}
        table.put_all(ones.items())
        table.put_all([])
        assert dict(table.items()) == ones
        first = Target.of("10.0.0.1", 1, "TCP")
        table.put(first, Frontend(7, 0, 0))
        assert table.get(first) == Frontend(7, 0, 0)
        assert table.remove(first)
        assert not table.remove(first)
        assert table.get(first) is None
        table.close()
        array = maps.PinnedMap(pin, "backends", Number, Backend)
        assert array.get(Number(constants.BACKENDS)) is None
        with pytest.raises(OSError, match="Argument list too long"):
            array.put(Number(constants.BACKENDS), Backend(layout.TARGET.pack(first)))
        array.close()

        balancer = Balancer(pin)
        good = LoadBalancerEntry("10.0.0.2", 80, "TCP", (EntryBackend("10.1.0.1", 80),), "x")
        twin = LoadBalancerEntry("::ffff:10.0.0.2", 80, "TCP", (), "y")
        mixed = LoadBalancerEntry("fd00::1", 80, "TCP", (EntryBackend("10.1.0.1", 80),), "z")
        wrong = LoadBalancerEntry("no address", 80, "TCP", (), "w")
        port = LoadBalancerEntry("10.0.0.3", 0, "TCP", (), "p")
        late = LoadBalancerEntry("10.0.0.4", 80, "TCP", (), "l", -1)
        light = LoadBalancerEntry("10.0.0.5", 80, "TCP", (EntryBackend("10.1.0.1", 80, -1),), "b")
        put = {"good": good, "twin": twin, "mixed": mixed, "wrong": wrong, "port": port}
        put |= {"late": late, "light": light}
        refused = balancer.replace(put)
        assert refused.keys() == put.keys() - {"good"}
        assert refused["twin"] == "the same address, port and protocol as good"
        assert "different families" in refused["mixed"]
        assert "no address" in refused["wrong"]
        assert refused["port"] == "0 is not a port"
        assert refused["late"] == "session affinity for -1 seconds"
        assert refused["light"] == "the backend 10.1.0.1 has the weight -1"
        # The last good version of a refused entry stays; what goes makes room for its twin.
        bad = LoadBalancerEntry("10.0.0.2", 80, "TCP", (EntryBackend("fd00::2", 80),), "x")
        assert balancer.apply({"good": bad}).keys() == {"good"}
        assert balancer.replace({"good": bad}).keys() == {"good"}
        assert Target.of("10.0.0.2", 80, "TCP") in frontends(pin)
        assert balancer.apply({"twin": twin}, ["good", "unknown"]) == {}
        assert frontends(pin) == {Target.of("10.0.0.2", 80, "TCP"): Frontend(0, 0, 0)}
        # A key whose entry has another frontend now takes the former one away.
        moved = LoadBalancerEntry("10.0.0.4", 80, "TCP", (), "y")
        assert balancer.apply({"twin": moved}) == {}
        assert frontends(pin) == {Target.of("10.0.0.4", 80, "TCP"): Frontend(0, 0, 0)}
        balancer.close()


@needs_bpf
def test_room_runs_out_for_what_is_new_only(tmp_path):
    def entry(port: int) -> dict[str, LoadBalancerEntry]:
        # Weights so far apart that the table is large: 64 of them fill the slots.
        backends = (EntryBackend("10.1.0.1", 80), EntryBackend("10.1.0.2", 80, 1_000_000))
        return {f"entry/{port}": LoadBalancerEntry("10.0.0.1", port, "TCP", backends, "x")}

    with steered(tmp_path) as (pin, _, _):
        balancer = Balancer(pin)
        many = {key: value for port in range(1, 67) for key, value in entry(port).items()}
        refused = balancer.apply(many)
        assert list(refused) == ["entry/65", "entry/66"]
        assert refused["entry/65"].startswith("no room for a table of 16381 slots")
        assert len(frontends(pin)) == 64
        # What goes may still be read by a program: the room is there for the next change.
        assert balancer.apply(entry(65), ["entry/1"]).keys() == {"entry/65"}
        assert balancer.apply(entry(65)) == {}
        assert len(frontends(pin)) == 64
        balancer.close()
        # A restarted agent knows what is taken.
        balancer = Balancer(pin)
        assert balancer.apply(entry(66)).keys() == {"entry/66"}
        balancer.close()


@needs_bpf
def test_a_full_map_refuses_and_what_was_in_force_stays(tmp_path):
    def entry(*hosts: int) -> dict[str, LoadBalancerEntry]:
        backends = tuple(EntryBackend(f"10.1.0.{host}", 80) for host in hosts)
        return {"entry/x": LoadBalancerEntry("10.0.0.1", 80, "TCP", backends, "x", 60)}

    with steered(tmp_path) as (pin, _, _):
        balancer = Balancer(pin)
        assert balancer.apply(entry(1)) == {}
        before = frontends(pin)
        table = maps.PinnedMap(pin, "members", Member, Number)
        [(own, one)] = table.items()
        strangers = [
            Member(bytes(20), number.to_bytes(20, "big")) for number in range(constants.MEMBERS - 1)
        ]
        table.put_all((stranger, one) for stranger in strangers)
        refused = balancer.apply(entry(1, 2, 3))
        assert refused == {"entry/x": "the kernel's maps do not take it: Argument list too long"}
        assert frontends(pin) == before
        assert table.get(own) == one
        # Two places: enough now, and nothing of the refused change is in the way.
        for stranger in strangers[:2]:
            table.remove(stranger)
        assert balancer.apply(entry(1, 2, 3)) == {}
        assert frontends(pin) != before
        table.close()
        balancer.close()


@needs_bpf
def test_a_refused_entry_leaves_no_backend_to_enrol(tmp_path):
    backend = EntryBackend("10.1.0.1", 80, sockmap=True)
    entry = LoadBalancerEntry("10.0.0.1", 80, "TCP", (backend,), "x", http=True, sockmap=True)
    with steered(tmp_path) as (pin, _, _):
        balancer = Balancer(pin)
        table = maps.PinnedMap(pin, "frontends", Target, Frontend)
        strangers = [
            Target(number.to_bytes(16, "big"), 1, 6) for number in range(constants.FRONTENDS)
        ]
        table.put_all((stranger, Frontend(0, 0, 0)) for stranger in strangers)
        fast = maps.PinnedMap(pin, "fast", Target, Number)
        assert balancer.apply({"x": entry}).keys() == {"x"}
        assert dict(fast.items()) == {}
        table.remove(strangers[0])
        assert balancer.apply({"x": entry}) == {}
        assert dict(fast.items()) == {Target.of("10.1.0.1", 80, "TCP"): Number(1)}
        for one in (table, fast, balancer):
            one.close()


def frontends(pin):
    table = maps.PinnedMap(pin, "frontends", Target, Frontend)
    try:
        return dict(table.items())
    finally:
        table.close()


def test_header_of_reasons():
    lines = reasons.c_header().splitlines()
    assert lines[0] == f"#define REASONS {len(Reason)}"
    assert "#define REASON_NO_BACKENDS 3" in lines
    assert "#define ERRNO_NO_BACKENDS 111" in lines
    assert not any(line.startswith("#define ERRNO_PASSED") for line in lines)
