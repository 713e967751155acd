"""Another layout of the maps: old sockets keep theirs until they close, new ones get the new."""

from __future__ import annotations

import subprocess
import sys

from bpf_world import ROOT, TIMEOUT_S, needs_bpf
from redirect_world import NODE, VIP, World, received, redirect_world

from bpf import layout, maps, pins, settings, syscall
from bpf.layout import Address, Number
from mesh.model.nodeconfig import MESH_HTTP_PORT

pytestmark = needs_bpf

# What a Weft of another layout would do, in a process of its own.
_OTHER_WEFT = f"""
import sys
from pathlib import Path
from bpf import layout
layout.PLAIN *= 2
from bpf import loader, podfilter, settings
from bpf.balancer import Balancer
from mesh.model.nodeconfig import LoadBalancerEntry, WorkloadSection
pin, cgroup, proxy_cgroup = map(Path, sys.argv[1:4])
loader.load(pin)
podfilter.renew(pin)
balancer = Balancer(pin)
entry = LoadBalancerEntry({VIP!r}, 80, "TCP", (), "x", http=True, sockmap=True)
assert balancer.replace({{"entry": entry}}) == {{}}
pod = WorkloadSection("x", "pod", ({NODE!r},))
assert settings.Identities(pin).replace({{"pod": pod}}) == {{}}
settings.steer_to_proxy(pin, (({NODE!r}, 15001),), sockmap=True)
loader.attach.attach(pin, cgroup, proxy_cgroup)
"""


def another_weft(world: World) -> None:
    command = [sys.executable, "-c", _OTHER_WEFT, world.pin, world.workloads, world.proxies]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr


def versions(world: World) -> set[str]:
    return {path.name for path in (world.pin / "maps").iterdir()}


def test_sockets_outlive_the_version_that_enrolled_them(tmp_path):
    def scenario(world: World) -> None:
        settings.steer_to_proxy(world.pin, ((NODE, MESH_HTTP_PORT),), sockmap=True)
        world.frontend(VIP, 80, http=True, sockmap=True)
        handles = world.handles()
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)
        old = world.connect(VIP, 80)
        old_proxy = world.accept(server)
        before = handles.origin(old_proxy.fileno())
        assert before is not None
        assert before.enrolled
        old_proxy.sendall(b"begun ")

        another_weft(world)
        assert len(versions(world)) == 2
        # Both go on by redirect: those of before, and new ones, of which only the new maps know.
        old_proxy.sendall(b"and ended")
        assert received(old, 15) == b"begun and ended"
        new = world.connect(VIP, 80)
        new_proxy = world.accept(server)
        assert handles.origin(new_proxy.fileno()) is None
        new_proxy.sendall(b"new")
        assert received(new, 3) == b"new"

        # The other version is current in this test's eyes, and goes last.
        maps.retire_versions(world.pin)
        assert len(versions(world)) == 2
        new.close()
        new_proxy.close()
        maps.retire_versions(world.pin)
        assert versions(world) == {pins.version()}
        old_proxy.sendall(b"still by redirect")
        assert received(old, 17) == b"still by redirect"

    with redirect_world(tmp_path) as world:
        world.run(scenario)


def test_pods_are_known_to_the_next_version(tmp_path):
    def scenario(world: World) -> None:
        table = maps.PinnedMap(world.pin, "interfaces", Address, Number)
        table.put(Address.of(NODE), Number(7))
        another_weft(world)
        [other] = versions(world) - {pins.version()}
        key, size = layout.ADDRESS.pack(Address.of(NODE)), layout.U32.size
        theirs = syscall.pinned(str(world.pin / "maps" / other / "interfaces"))
        assert syscall.lookup(theirs, key, size) == layout.U32.pack(Number(7))

    with redirect_world(tmp_path) as world:
        world.run(scenario)
