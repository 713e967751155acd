"""Configurations on their way to workers, over real socket pairs with the worker's end in the test;
and the node that publishes statuses only when they are true."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import msgspec
import pytest

from gateway.control import ControlPlane, Options
from mesh.agent import rollout as rollout_module
from mesh.agent.flow_peers import Peers
from mesh.agent.flows import FlowStore
from mesh.agent.node import Node
from mesh.agent.rollout import Rollout
from mesh.model.channel import Bound, FrameReader, PortAddress, Proof, encode_frame
from mesh.model.decode import decode, key_of
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Ack, ClusterSection, LoadBalancerEntry, SvidSection
from mesh.sources.update import SourceUpdate
from tests.support.running import gateway, route

WAIT_S = 10
ONE, TWO = ClusterSection(protocol="http"), ClusterSection(protocol="h2c")
ENTRY = LoadBalancerEntry("192.0.2.1", 80, "TCP", (), "x")


class WorkerEnd:
    """A worker's end of its config channel."""

    def __init__(self, sock):
        self.sock = sock
        self.reader = FrameReader()
        self.waiting = []
        sock.setblocking(False)

    async def receive(self):
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WAIT_S):
            while not self.waiting:
                data = await loop.sock_recv(self.sock, 1 << 20)
                if not data:
                    return None
                self.waiting += self.reader.receive(data)
        return self.waiting.pop(0)

    def received_nothing(self):
        """At this moment: nothing is in the socket either."""
        with pytest.raises(BlockingIOError):
            self.sock.recv(1, socket.MSG_PEEK)
        return not self.waiting

    def ack(self, version, **refused):
        self.sock.send(encode_frame(Ack(version, refused)))


class Events:
    """What a Rollout reports."""

    def __init__(self):
        self.changed = asyncio.Event()
        self.lost = []

    async def until(self, holds):
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await self.changed.wait()
                self.changed.clear()


@asynccontextmanager
async def made(workers, expected=None):
    events = Events()

    def lost(number, pid):
        events.lost.append((number, pid))

    rollout = Rollout(workers if expected is None else expected, events.changed.set, lost)
    ends = []
    for number in range(workers):
        ends.append(await connect(rollout, number))
    try:
        yield rollout, events, ends
    finally:
        for end in ends:
            end.sock.close()
        await events.until(lambda: not rollout.workers)


async def connect(rollout, number):
    ours, theirs = socket.socketpair()
    await rollout.connect(number, 100 + number, ours)
    return WorkerEnd(theirs)


async def test_whole_first_then_deltas():
    async with made(2) as (rollout, events, ends):
        assert all(end.received_nothing() for end in ends)
        rollout.publish({"cluster/a": ONE, "cluster/b": ONE, "entry/x": ENTRY}, ())
        for end in ends:
            delta = await end.receive()
            assert (delta.base, delta.version) == (None, 1)
            assert delta.put == {"cluster/a": ONE, "cluster/b": ONE}  # no entries for workers
        assert rollout.in_flight
        ends[0].ack(1)
        await events.until(lambda: rollout.workers[0].version == 1)
        assert rollout.in_flight
        ends[1].ack(1)
        await events.until(lambda: not rollout.in_flight)
        rollout.publish({"cluster/a": TWO}, ("cluster/b",))
        for end in ends:
            delta = await end.receive()
            assert (delta.base, delta.version) == (1, 2)
            assert (delta.put, delta.remove) == ({"cluster/a": TWO}, ("cluster/b",))


async def test_a_new_channel_gets_the_whole_value_and_replaces_the_old_one():
    async with made(1) as (rollout, events, ends):
        rollout.publish({"cluster/a": ONE}, ())
        rollout.publish({"cluster/b": ONE}, ())
        ends.append(await connect(rollout, 0))
        delta = await ends[1].receive()
        assert (delta.base, delta.version) == (None, 2)
        assert delta.put == {"cluster/a": ONE, "cluster/b": ONE}
        while await ends[0].receive() is not None:
            pass
        ends[1].ack(2)
        await events.until(lambda: not rollout.in_flight)
        assert events.lost == []


async def test_a_lost_channel_is_reported_and_holds_nothing_up():
    async with made(2) as (rollout, events, ends):
        rollout.publish({"cluster/a": ONE}, ())
        ends[0].ack(1, **{"cluster/a": "bad"})
        await events.until(lambda: rollout.refusals() == {"cluster/a": "bad"})
        ends[1].ack(1)
        ends[0].sock.close()
        await events.until(lambda: events.lost == [(0, 100)])
        assert rollout.refusals() == {}
        assert [worker.id for worker in rollout.workers] == [1]


async def test_bytes_that_are_no_acknowledgement_end_the_channel():
    async with made(1) as (rollout, events, ends):
        rollout.publish({"cluster/a": ONE}, ())
        ends[0].sock.send(b"\0\0\0\x02\xff\xff")
        await events.until(lambda: events.lost == [(0, 100)])


async def test_a_worker_that_does_not_answer_is_left_behind_until_it_does(monkeypatch):
    monkeypatch.setattr(rollout_module, "ACK_LIMIT_S", 0.05)
    async with made(2) as (rollout, events, ends):
        rollout.publish({"cluster/a": ONE}, ())
        ends[0].ack(1)
        await events.until(lambda: not rollout.in_flight)
        assert [worker.lagging for worker in rollout.workers] == [False, True]
        rollout.publish({"cluster/b": ONE}, ())
        assert (await ends[0].receive()).version == 1
        assert (await ends[0].receive()).version == 2
        ends[0].ack(2)
        await events.until(lambda: not rollout.in_flight)
        assert (await ends[1].receive()).version == 1
        assert ends[1].received_nothing()
        ends[1].ack(1)
        await events.until(lambda: not rollout.workers[1].lagging)
        delta = await ends[1].receive()
        assert (delta.base, delta.version) == (None, 2)
        assert delta.put == {"cluster/a": ONE, "cluster/b": ONE}
        ends[1].ack(2)
        await events.until(lambda: not rollout.in_flight)


async def test_workers_that_have_not_come_yet_are_waited_for_for_a_while(monkeypatch):
    monkeypatch.setattr(rollout_module, "ACK_LIMIT_S", 0.2)
    async with made(1, expected=2) as (rollout, events, ends):
        rollout.publish({"cluster/a": ONE}, ())
        ends[0].ack(1)
        await events.until(lambda: rollout.workers[0].version == 1)
        assert rollout.in_flight
        await events.until(lambda: not rollout.in_flight)


async def test_without_any_worker_nothing_is_in_force():
    async with made(0) as (rollout, _, _):
        rollout.publish({"cluster/a": ONE}, ())
        assert rollout.in_flight


# --- the node ------------------------------------------------------------------------------------


def source_update(*manifests):
    changes = {}
    for text in manifests:
        for document in text.split("\n---\n"):
            obj = decode(json.loads(document))
            changes.setdefault(obj.kind, {})[key_of(obj)] = obj
    return SourceUpdate(changes, ())


class Running:
    """A node with one worker; the test is the worker, the source and the supervisor."""

    def __init__(self):
        self.wanted = asyncio.Queue()
        self.rollout = Rollout(1, self.changed, lambda number, pid: None)
        plane = ControlPlane(Options())
        self.ready = 0
        self.node = Node(
            plane=plane,
            rollout=self.rollout,
            want=self.wanted.put_nowait,
            ready=self.count_ready,
            datapath=None,
            flows=FlowStore(Peers()),
        )

    def changed(self):
        self.node.look_again()

    def count_ready(self):
        self.ready += 1

    def condition(self, kind, name, type):
        status = self.node.statuses.get(kind, ObjectKey("default", name))
        if status is None:
            return None
        conditions = status.parents[0].conditions if kind == "HTTPRoute" else status.conditions
        return next(c for c in conditions if c.type == type)


@asynccontextmanager
async def running_node():
    running = Running()
    work = asyncio.ensure_future(running.node.run())
    end = await connect(running.rollout, 0)
    try:
        yield running, running.node, end
    finally:
        end.sock.close()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def settle(holds):
    """Let the node do what it can do now."""
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0)


async def test_statuses_wait_for_acknowledgement_and_ports():
    async with running_node() as (running, node, end):
        assert node.not_ready()[0] == "the manifests have not been read yet"
        node.source_changed(source_update(gateway(8080), route("r")))
        assert (await end.receive()).version == 1
        assert await running.wanted.get() == (PortAddress("0.0.0.0", 8080),)
        assert running.condition("Gateway", "gw", "Programmed") is None
        end.ack(1)
        await settle(lambda: not running.rollout.in_flight)
        assert running.condition("Gateway", "gw", "Programmed") is None
        assert node.not_ready() == ["the ports have not been bound yet"]
        assert running.ready == 0
        node.bound_changed(Bound((PortAddress("0.0.0.0", 8080),)))
        await settle(lambda: running.condition("Gateway", "gw", "Programmed") is not None)
        assert running.condition("Gateway", "gw", "Programmed").status == "True"
        assert running.condition("HTTPRoute", "r", "Accepted").status == "True"
        assert node.not_ready() == node.degraded() == []
        assert running.ready == 1
        node.source_changed(source_update(route("r", path="/new")))
        end.ack((await end.receive()).version)
        await settle(lambda: not running.rollout.in_flight)
        assert running.ready == 1


async def test_a_refused_route_is_never_reported_as_accepted():
    async with running_node() as (running, node, end):
        node.source_changed(source_update(gateway(8080), route("r")))
        node.bound_changed(Bound((PortAddress("0.0.0.0", 8080),)))
        await end.receive()
        end.ack(1, **{"route/HTTPRoute/default/r": "the expression is wrong"})
        await settle(lambda: running.condition("HTTPRoute", "r", "Accepted") is not None)
        accepted = running.condition("HTTPRoute", "r", "Accepted")
        assert accepted.status == "False"
        assert "the expression is wrong" in accepted.message
        assert any("the expression is wrong" in text for text in node.degraded())
        since = accepted.last_transition_time
        node.source_changed(source_update(route("r", path="/new")))
        version = (await end.receive()).version
        end.ack(version)
        await settle(lambda: running.condition("HTTPRoute", "r", "Accepted").status == "True")
        assert running.condition("HTTPRoute", "r", "Accepted").last_transition_time >= since
        assert node.degraded() == []


async def test_changes_gather_while_a_version_is_in_flight():
    async with running_node() as (_, node, end):
        node.source_changed(source_update(gateway(8080)))
        node.bound_changed(Bound((PortAddress("0.0.0.0", 8080),)))
        assert (await end.receive()).version == 1
        for number in range(5):
            node.source_changed(source_update(route(f"r{number}")))
        assert end.received_nothing()
        end.ack(1)
        delta = await end.receive()
        assert (delta.base, delta.version) == (1, 2)
        names = {key.rpartition("/")[2] for key in delta.put if key.startswith("route/")}
        assert names == {f"r{number}" for number in range(5)}


async def test_sections_that_are_not_the_control_planes():
    """They go out with the next version, and who gave them learns when that is in force."""
    async with running_node() as (_, node, end):
        svid = SvidSection("spiffe://x/ns/a/sa/b", "chain", "key", 1)
        first = node.sections_changed({"svid/x": svid, "svid/y": svid}, ())
        second = node.sections_changed({}, ("svid/y",))
        assert end.received_nothing()
        node.source_changed(source_update(gateway(8080)))
        node.bound_changed(Bound((PortAddress("0.0.0.0", 8080),)))
        delta = await end.receive()
        assert delta.put["svid/x"] == svid
        assert "svid/y" not in delta.put
        third = node.sections_changed({}, ("svid/x",))
        assert not first.done()
        end.ack(1)
        await first
        await second
        delta = await end.receive()
        assert (delta.put, delta.remove) == ({}, ("svid/x",))
        assert not third.done()
        end.ack(2)
        await third


async def test_a_port_that_is_bound_later_becomes_programmed():
    async with running_node() as (running, node, end):
        port = PortAddress("0.0.0.0", 8080)
        node.bound_changed(Bound((), ((port, "somebody has it"),)))
        node.source_changed(source_update(gateway(8080), route("r")))
        end.ack((await end.receive()).version)
        await settle(lambda: running.condition("Gateway", "gw", "Programmed") is not None)
        assert "somebody has it" in running.condition("Gateway", "gw", "Programmed").message
        assert "not listening on 0.0.0.0 port 8080: somebody has it" in node.degraded()
        node.bound_changed(Bound((port,)))
        await settle(lambda: running.condition("Gateway", "gw", "Programmed").status == "True")


async def test_nothing_is_made_of_a_directory_that_was_never_readable():
    """An agent that starts while the directory is away must not take the workers' routes."""
    async with running_node() as (_, node, end):
        node.source_changed(SourceUpdate({}, (), complete=False))
        node.source_changed(source_update(gateway(8080)))
        delta = await end.receive()
        assert delta.version == 1
        assert "port/0.0.0.0|8080" in delta.put


async def test_a_status_goes_with_its_object():
    async with running_node() as (running, node, end):
        node.source_changed(source_update(gateway(8080), route("r")))
        node.bound_changed(Bound((PortAddress("0.0.0.0", 8080),)))
        end.ack((await end.receive()).version)
        await settle(lambda: running.condition("HTTPRoute", "r", "Accepted") is not None)
        node.source_changed(SourceUpdate({"HTTPRoute": {ObjectKey("default", "r"): None}}, ()))
        delta = await end.receive()
        assert delta.remove == ("route/HTTPRoute/default/r",)
        end.ack(delta.version)
        await settle(lambda: running.condition("HTTPRoute", "r", "Accepted") is None)
        assert node.object_counts()["HTTPRoute"] == 0


async def test_what_peers_prove_to_one_worker_is_told_to_the_others():
    proof = Proof("shop/web", False, "spiffe://x/ns/shop/sa/web", "spiffe://x/y", "::1", (b"c",))
    async with made(3) as (rollout, _, ends):
        ends[1].sock.send(encode_frame(proof))
        assert await ends[0].receive() == proof
        assert await ends[2].receive() == proof
        assert ends[1].received_nothing()
        # The last one of each pair is told again to who was not there.
        newer = msgspec.structs.replace(proof, chain=(b"d",))
        other = msgspec.structs.replace(proof, told="10.0.0.1")
        for one in (newer, other):
            ends[1].sock.send(encode_frame(one))
            assert await ends[0].receive() == one
        ends[2].sock.close()
        ends[2] = await connect(rollout, 2)
        assert [await ends[2].receive() for _ in range(2)] == [newer, other]
