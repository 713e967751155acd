"""Another layout of the maps: old sockets keep theirs until they close, new ones get the new."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

from bpf_world import ROOT, TIMEOUT_S, needs_bpf
from redirect_world import NODE, VIP, World, await_that, received, redirect_world

from bpf import maps, pins, settings
from bpf import versions as version_files
from bpf.programs import PROGRAMS, Place
from bpf.structs import Flow, FlowKey, Target
from mesh.model.nodeconfig import MESH_HTTP_PORT, EntryBackend

pytestmark = needs_bpf

# What a Weft of another layout would do, in a process of its own.
_OTHER_WEFT = f"""
import os, sys
from pathlib import Path
from bpf import constants
constants.PLAIN *= 2
from bpf import loader, settings, syscall, versions
from bpf.balancer import Balancer
from mesh.model.nodeconfig import EntryBackend, LoadBalancerEntry, WorkloadSection
pin, cgroup, proxy_cgroup = map(Path, sys.argv[1:4])
port, steps = map(int, sys.argv[4:6])
loader.load(pin)
balancer = Balancer(pin)
entry = LoadBalancerEntry({VIP!r}, 80, "TCP", (), "x", http=True, sockmap=True)
own = LoadBalancerEntry({NODE!r}, port, "TCP", (EntryBackend({NODE!r}, port, sockmap=True),), "y",
                        http=True, sockmap=True)
assert balancer.replace({{"entry": entry, "own": own}}) == {{}}
pod = WorkloadSection("x", "pod", ({NODE!r},), identity=300)
assert settings.Identities(pin).replace({{"pod": pod}}) == {{}}
settings.steer_to_proxy(pin, (({NODE!r}, 15001),), sockmap=True)

def stepped(call):
    def step(*arguments):
        print(flush=True)
        sys.stdin.readline()
        return call(*arguments)
    return step

if steps:
    syscall.link, syscall.update_link = map(stepped, (syscall.link, syscall.update_link))
loader.attach.attach(pin, cgroup, proxy_cgroup)
versions.take_over(pin)
"""


def other_weft(world: World, port: int, *, steps: bool) -> list[str]:
    command = [sys.executable, "-c", _OTHER_WEFT]
    return [*command, *map(str, (world.pin, world.workloads, world.proxies, port, int(steps)))]


def another_weft(world: World, port: int = 9) -> None:
    """`port`: of a backend at NODE."""
    command = other_weft(world, port, steps=False)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def another_weft_in_steps(world: World, port: int) -> Iterator[Iterator[None]]:
    """One for each link that it makes or changes."""
    with subprocess.Popen(
        other_weft(world, port, steps=True), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def steps(ask: IO[bytes], answers: IO[bytes]) -> Iterator[None]:
            while answers.readline():
                yield
                ask.write(b"\n")
                ask.flush()
            yield

        yield steps(process.stdin, process.stdout)
    assert process.returncode == 0


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
        # Who asks all versions knows both.
        handles = world.handles()
        assert handles.origin(old_proxy.fileno()) == before
        other = handles.origin(new_proxy.fileno())
        assert other is not None
        assert other.enrolled
        assert handles.queued(before.cookie) == handles.queued(other.cookie) == 0
        old_proxy.sendall(b"unread")
        assert handles.queued(before.cookie)
        assert received(old, 6) == b"unread"
        new_proxy.sendall(b"new")
        assert received(new, 3) == b"new"

        # The other version is current in this test's eyes, and goes last.
        version_files.retire(world.pin)
        assert len(versions(world)) == 2
        new.close()
        new_proxy.close()
        version_files.retire(world.pin)
        assert versions(world) == {pins.version()}
        old_proxy.sendall(b"still by redirect")
        assert received(old, 17) == b"still by redirect"

    with redirect_world(tmp_path) as world:
        world.run(scenario)


def test_backends_are_paired_by_the_version_that_is_attached(tmp_path):
    def scenario(world: World) -> None:
        settings.steer_to_proxy(world.pin, ((NODE, MESH_HTTP_PORT),), sockmap=True)
        server = world.listen(NODE)
        port = server.getsockname()[1]
        own = EntryBackend(NODE, port, sockmap=True)
        world.frontend(NODE, port, own, http=True, sockmap=True)
        another_weft(world, port)
        handles = world.handles()

        def pair() -> tuple[socket.socket, socket.socket, int | None]:
            with world.as_proxy():
                proxy = world.connect(NODE, port)
            backend = world.accept(server)
            return proxy, backend, handles.pair(proxy.fileno())

        proxy, backend, cookie = pair()
        assert cookie
        proxy.sendall(b"by redirect")
        assert received(backend, 11) == b"by redirect"
        handles.mark_plain(Target.of(NODE, port, "TCP"))
        proxy, backend, cookie = pair()
        assert cookie == 0
        proxy.sendall(b"by TCP")
        assert received(backend, 6) == b"by TCP"

    with redirect_world(tmp_path) as world:
        world.run(scenario)


def test_redirects_are_stopped_in_the_maps_of_all_versions(tmp_path):
    def scenario(world: World) -> None:
        settings.steer_to_proxy(world.pin, ((NODE, MESH_HTTP_PORT),), sockmap=True)
        another_weft(world)
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)

        def enrolled() -> bool:
            workload = world.connect(VIP, 80)
            proxy = world.accept(server)
            found = world.handles().origin(proxy.fileno())
            assert found is not None
            proxy.sendall(b"whole")
            assert received(workload, 5) == b"whole"
            return found.enrolled

        assert enrolled()
        version_files.stop_redirects(world.pin, versions(world))
        assert not enrolled()

    with redirect_world(tmp_path) as world:
        world.run(scenario)


def test_open_connections_are_known_to_the_next_version(tmp_path):
    def scenario(world: World) -> None:
        flows = maps.PinnedMap(world.pin, "flows", FlowKey, Flow)
        # More than are read at a time.
        known = {
            FlowKey(port.to_bytes(40, "big"), 0): Flow(1, port, 0, 0, 0) for port in range(10_000)
        }
        flows.put_all(known.items())
        another_weft(world)
        [other] = versions(world) - {pins.version()}
        theirs = maps.PinnedMap(world.pin, "flows", FlowKey, Flow, other)
        assert dict(theirs.items()) == known
        # What it has come to know since stays.
        key = next(iter(known))
        theirs.put(key, Flow(2, 3, 0, 0, 0))
        another_weft(world)
        assert dict(theirs.items()) == {**known, key: Flow(2, 3, 0, 0, 0)}

    with redirect_world(tmp_path) as world:
        world.run(scenario)


def test_who_was_asked_for_is_told_when_the_version_of_the_connection_has_gone(tmp_path):
    def scenario(world: World) -> None:
        server = world.listen(NODE)
        world.frontend(VIP, 5432, EntryBackend(NODE, server.getsockname()[1]))
        old = world.connect(VIP, 5432)
        world.accept(server)
        another_weft(world)
        assert old.getpeername() == (VIP, 5432)
        pins.remove_version(world.pin, pins.version())
        assert old.getpeername() == (VIP, 5432)

    with redirect_world(tmp_path) as world:
        world.run(scenario)


def test_no_connection_fails_while_another_version_takes_over(tmp_path):
    """Nor would one if that were killed at any moment."""

    def connects(world: World, server: socket.socket, mesh: socket.socket) -> None:
        handles = world.handles()
        workload = world.connect(VIP, 80)
        proxy = world.accept(mesh)
        origin = handles.origin(proxy.fileno())
        assert origin is not None
        assert origin.asked == Target.of(VIP, 80, "TCP")
        proxy.sendall(b"to the workload")
        assert received(workload, 15) == b"to the workload"
        assert workload.getpeername() == (VIP, 80)
        with world.as_proxy():
            proxy = world.connect(*server.getsockname())
        backend = world.accept(server)
        await_that(lambda: handles.pair(proxy.fileno()) is not None)
        proxy.sendall(b"to the backend")
        assert received(backend, 14) == b"to the backend"

    def scenario(world: World) -> None:
        settings.steer_to_proxy(world.pin, ((NODE, MESH_HTTP_PORT),), sockmap=True)
        server = world.listen(NODE)
        port = server.getsockname()[1]
        own = EntryBackend(NODE, port, sockmap=True)
        world.frontend(NODE, port, own, http=True, sockmap=True)
        world.frontend(VIP, 80, http=True, sockmap=True)
        with world.as_proxy():
            mesh = world.listen(NODE, MESH_HTTP_PORT)
        old = world.connect(VIP, 80)
        world.accept(mesh)
        with another_weft_in_steps(world, port) as steps:
            count = 0
            for _ in steps:
                connects(world, server, mesh)
                assert old.getpeername() == (VIP, 80)
                count += 1
        cgroups = (Place.WORKLOADS, Place.PROXIES)
        assert count > sum(program.place in cgroups for program in PROGRAMS.values())

    with redirect_world(tmp_path) as world:
        world.run(scenario)
