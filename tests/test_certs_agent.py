"""The identities of a node: asked for, renewed, lost; in virtual time with a real authority, and
with real processes. No sleeps."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from authority_world import DOMAIN, GATEWAY, authority_in, pod, spiffe
from certs_world import NOW, Domain, chain_der
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from loops import advance, on_virtual_loop

from certs.authority import Authority, Lives
from certs.bundle import Bundle
from certs.issue import Life
from certs.spiffe import parse
from certs.svid import new_request, peer_identity
from certs.wire import Answer
from mesh.agent.authority import NoAnswer
from mesh.agent.svid_file import SvidFile
from mesh.agent.svids import Svids
from mesh.authority.pods import Placement
from mesh.authority.service import Service
from mesh.cli.main import cli
from mesh.model.decode import decode, key_of
from mesh.model.nodeconfig import SvidSection, TrustBundleSection, WorkloadSection
from mesh.model.section import bundle_key, svid_key, workload_key
from mesh.sources.directory import SourceUpdate
from tests.support.running import running

LIFE = 1000.0
CART, WEB = spiffe("cart"), spiffe("web")


class World:
    """An authority, node a of it, and what the node's workers were told. `down`: the authority
    does not answer; `hangs`: nor say so; `slow`: workers do not acknowledge."""

    def __init__(self, directory, life=LIFE):
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()
        self.file = SvidFile(directory / "svids.json")
        self.authority = Authority(directory / "ca", DOMAIN, Lives(svid_s=life), self.now())
        self.placement = Placement(DOMAIN)
        self.service = Service(self.authority, self.placement, ("a",), self.now)
        self.down = self.slow = False
        self.hangs = None
        self.forge = None
        self.sections = {}
        self.told = []
        self.waiting = []
        self.asked = 0
        self.svids = Svids(self, DOMAIN, self.file, self.now)
        self.svids.attach(self.put)

    ahead = 0.0  # of the clock, which somebody sets

    def now(self):
        return NOW + self._loop.time() - self._start + self.ahead

    # The client of the agent, without a socket.

    async def sign(self, requests):
        self.asked += 1
        if self.hangs:
            await self.hangs.wait()
        if self.down:
            raise NoAnswer("the authority is away")
        if self.forge:
            return tuple(self.forge(pem) for pem in requests)
        return tuple(self.service.sign("a", pem) for pem in requests)

    async def bundle(self, have):
        if self.down:
            raise NoAnswer("the authority is away")
        return await self.service.bundle("a", have)

    # The node.

    def put(self, put, remove):
        for key in remove:
            self.sections.pop(key, None)
        self.sections.update(put)
        self.told.append((set(put), set(remove)))
        future = self._loop.create_future()
        self.waiting.append(future)
        if not self.slow:
            self.acknowledge()
        return future

    def acknowledge(self):
        while self.waiting:
            self.waiting.pop().set_result(None)

    def place(self, *pods):
        """What the manifests say; the node's own control plane sees the same."""
        changes, put = {}, {}
        for name, account in pods:
            obj = decode_pod(pod(name, "a", account)) if account else None
            key = key_of(decode_pod(pod(name, "a", "x")))
            changes[key] = obj
            if obj is not None:
                put[workload_key(*key)] = WorkloadSection(
                    key.namespace,
                    key.name,
                    ("10.0.0.1",),
                    "a",
                    True,
                    account,
                    spiffe_id=spiffe(account),
                )
        self.placement.changed("x", SourceUpdate({"Pod": changes}, ()))
        gone = tuple(workload_key(*key) for key in changes if changes[key] is None)
        self.svids.workloads_changed(put, gone)

    def svid(self, spiffe_id):
        """The SVID that workers have, verified as a peer would; None: none."""
        section = self.sections.get(svid_key(spiffe_id))
        if section is None:
            return None
        bundle = Bundle.from_pem(DOMAIN, self.sections[bundle_key(DOMAIN)].roots_pem)
        found = peer_identity(chain_der(section.chain_pem), {DOMAIN: bundle}, self.now())
        assert str(found) == spiffe_id == section.spiffe_id
        return section


def decode_pod(text):
    return decode(json.loads(text))


def workload(name, account, node="a"):
    return WorkloadSection(
        "shop", name, ("10.0.0.1",), node, node == "a", account, spiffe_id=spiffe(account)
    )


@asynccontextmanager
async def world_in(directory, **options):
    world = World(directory, **options)
    tasks = [asyncio.ensure_future(world.service.tend()), asyncio.ensure_future(world.svids.run())]
    try:
        await settled()
        yield world
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        world.authority.close()


async def settled():
    """Everything that can go on without time has gone on."""
    for _ in range(50):
        await asyncio.sleep(0)


async def after(seconds, step=5.0):
    """Time passes, and nobody is late by more than a step."""
    while seconds > 0:
        advance(min(step, seconds))
        seconds -= step
        await settled()


@on_virtual_loop
async def test_identities_of_the_nodes_workloads(tmp_path):
    async with world_in(tmp_path) as world:
        assert world.svid(GATEWAY)
        world.place(("cart-1", "cart"), ("cart-2", "cart"), ("web-1", "web"))
        await settled()
        assert world.svid(CART)
        assert world.svid(WEB)
        assert not world.svids.waiting()
        assert world.svids.degraded() == []
        section = world.svid(CART)
        key = load_pem_private_key(section.key_pem.encode(), None)
        assert key.curve.name == "secp256r1"
        status = {one.spiffe_id: one for one in world.svids.statuses()}
        assert status[CART].workloads == ("shop/cart-1", "shop/cart-2")
        assert status[CART].not_after == section.not_after
        # As long as one of them is there.
        world.place(("cart-1", None))
        await settled()
        assert world.svid(CART) is section
        world.place(("cart-2", None))
        await settled()
        assert world.svid(CART) is None
        assert CART not in world.svids.seconds_left()
        assert world.svid(WEB)


@on_virtual_loop
async def test_a_pod_in_another_ones_place_has_its_identity_at_once(tmp_path):
    async with world_in(tmp_path) as world:
        world.place(("cart-1", "cart"))
        await settled()
        before = world.svid(CART)
        world.place(("cart-1", None), ("cart-2", "cart"))
        assert world.svid(CART) is before
        assert not any(svid_key(CART) in removed for _, removed in world.told)


@on_virtual_loop
async def test_pods_of_other_nodes_have_none_here(tmp_path):
    async with world_in(tmp_path) as world:
        world.svids.workloads_changed({workload_key("shop", "x"): workload("x", "cart", "b")}, ())
        await settled()
        assert [one.spiffe_id for one in world.svids.statuses()] == [GATEWAY]


@on_virtual_loop
async def test_many_identities(tmp_path):
    """More than one request may hold."""
    async with world_in(tmp_path) as world:
        world.place(*((f"p{n}", f"account-{n}") for n in range(150)))
        await settled()
        assert all(world.svid(spiffe(f"account-{n}")) for n in range(150))
        assert world.asked == 1 + 3


@on_virtual_loop
async def test_renewed_at_half_life(tmp_path):
    async with world_in(tmp_path) as world:
        first = world.svid(GATEWAY)
        await after(440)
        assert world.svid(GATEWAY) is first
        await after(120)
        second = world.svid(GATEWAY)
        assert second.not_after > first.not_after
        assert second.key_pem != first.key_pem
        await after(5000, step=50)
        assert world.svid(GATEWAY).not_after > second.not_after
        assert not any(removed for _, removed in world.told)
        assert world.svids.failures == {}


@on_virtual_loop
async def test_not_all_at_once(tmp_path):
    async with world_in(tmp_path) as world:
        world.place(*((f"p{n}", f"account-{n}") for n in range(50)))
        await settled()
        moments = [one.renewal for one in world.svids.statuses()]
        assert max(moments) - min(moments) > 30
        assert all(NOW + 440 < moment < NOW + 560 for moment in moments)


@on_virtual_loop
async def test_the_authority_is_away(tmp_path):
    """Nothing happens to what is held; people see the time count down; then it fails closed."""
    async with world_in(tmp_path) as world:
        held = world.svid(GATEWAY)
        world.down = True
        await after(600)
        assert world.svid(GATEWAY) is held
        said = " ".join(world.svids.degraded())
        assert "the SVID of spiffe://cluster.local/ns/weft-system/sa/weft-gateway cannot be" in said
        assert re.search("it expires in 6m(39|40)s: the authority is away", said)
        assert re.search("the first SVID expires in 6m(39|40)s", said)
        await after(120)
        assert re.search("it expires in 4m(39|40)s", " ".join(world.svids.degraded()))
        assert world.svids.failures["no_answer"] > 3
        assert world.svids.seconds_left() == {GATEWAY: pytest.approx(280, abs=1)}
        tried = world.asked
        await after(270)
        # Not all the time, but soon enough.
        assert 20 < world.asked - tried < 120
        assert world.svid(GATEWAY) is held
        await after(10)
        assert world.svid(GATEWAY) is None
        assert world.svids.seconds_left() == {GATEWAY: 0}
        said = " ".join(world.svids.degraded())
        assert "has no valid SVID, so its connections to other nodes are refused" in said
        assert "the authority is away" in said

        world.down = False
        await after(10)
        assert world.svid(GATEWAY)
        assert world.svids.degraded() == []


@on_virtual_loop
async def test_clocks_are_set(tmp_path):
    """Back: it is asked as often as before, and nothing is thrown away. Forward: what has expired
    is noticed, though no timer was due."""
    async with world_in(tmp_path) as world:
        world.down = True
        await after(600)
        held, tried = world.svid(GATEWAY), world.asked
        world.ahead = -500.0
        await after(70)
        assert world.asked > tried
        assert world.svid(GATEWAY) is held
        world.down, world.ahead = False, 0.0
        await after(70)
        assert world.svids.degraded() == []
        held, world.ahead = world.svid(GATEWAY), 4000.0
        await after(70)
        assert world.svid(GATEWAY).not_after > held.not_after + 3600


@on_virtual_loop
async def test_a_clock_that_was_ahead_is_set_back(tmp_path):
    """Nobody believes SVIDs that are not valid yet: there are others at once."""
    async with world_in(tmp_path) as world:
        world.ahead = 86_400.0
        await after(2000)
        assert world.svid(GATEWAY).not_after > world.now()
        world.ahead = 0.0
        await after(130)
        assert world.svid(GATEWAY).not_after < world.now() + LIFE + 1
        assert world.svids.degraded() == []


@on_virtual_loop
async def test_what_expires_does_so_while_an_answer_is_waited_for(tmp_path):
    async with world_in(tmp_path) as world:
        world.hangs = asyncio.Event()
        await after(990)
        assert world.svid(GATEWAY)
        await after(20)
        assert world.svid(GATEWAY) is None
        world.hangs.set()
        await after(10)
        assert world.svid(GATEWAY)


@on_virtual_loop
async def test_the_authority_is_not_there_yet(tmp_path):
    world = World(tmp_path)
    world.down = True
    tasks = [asyncio.ensure_future(world.service.tend()), asyncio.ensure_future(world.svids.run())]
    assert world.svids.waiting()
    await settled()
    # A node does not wait for ever to be ready.
    assert not world.svids.waiting()
    assert "the authority is away" in " ".join(world.svids.degraded())
    world.down = False
    await after(1, step=0.1)
    assert world.svid(GATEWAY)
    assert world.svids.degraded() == []
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    world.authority.close()


@on_virtual_loop
async def test_what_the_authority_does_not_know_yet(tmp_path):
    """The pod is seen here first."""
    async with world_in(tmp_path) as world:
        world.svids.workloads_changed({workload_key("shop", "w"): workload("w", "web")}, ())
        await settled()
        assert world.svid(WEB) is None
        assert world.svids.failures == {"not_on_this_node": 1}
        assert "the authority refuses: not_on_this_node" in " ".join(world.svids.degraded())
        world.place(("web-1", "web"))
        await after(1, step=0.1)
        assert world.svid(WEB)


@on_virtual_loop
async def test_answers_that_are_not_what_was_asked_for(tmp_path):
    """Of another key, another identity, another root, or nonsense: none reaches the workers."""
    async with world_in(tmp_path) as world:
        held = world.svid(GATEWAY)
        evil = Domain(DOMAIN).intermediate
        life = Life.between(world.now() - 60, world.now() + 3600)

        def of_another_root(pem):
            key = x509.load_pem_x509_csr(pem.encode()).public_key()
            return Answer(_pem(evil.svid(key, parse(GATEWAY), life)) + _pem(evil.certificate))

        def of_another_key(_pem):
            return world.service.sign("a", new_request(parse(GATEWAY))[1])

        for forge, reason in (
            (of_another_key, "no_certificate"),
            (of_another_root, "unknown_issuer"),
            (lambda pem: Answer("garbage"), "no_certificate"),
            (lambda pem: Answer(), "no_certificate"),
        ):
            world.forge, before = forge, world.svids.failures[reason]
            while world.svids.failures[reason] == before:
                await after(1)
            assert world.svid(GATEWAY) is held
            assert "the authority's answer cannot be used" in " ".join(world.svids.degraded())
        world.forge = None
        await after(60)
        assert world.svid(GATEWAY).not_after > held.not_after


def _pem(certificate):
    return certificate.public_bytes(Encoding.PEM).decode()


@on_virtual_loop
async def test_a_new_root_is_everywhere_before_it_issues(tmp_path):
    """The workers' acknowledgement is what counts."""
    async with world_in(tmp_path) as world:
        old = world.sections[bundle_key(DOMAIN)]
        world.slow = True
        world.authority.rotate_root(world.now())
        world.service._tend.set()
        await settled()
        both = world.sections[bundle_key(DOMAIN)]
        assert both.roots_pem.count("BEGIN") == 2
        await after(100)
        states = {one.state for one in world.authority.describe() if one.role == "root"}
        assert states == {"active", "next"}
        world.acknowledge()
        world.slow = False
        await settled()
        states = {one.state for one in world.authority.describe() if one.role == "root"}
        assert states == {"active", "retiring"}
        assert world.sections[bundle_key(DOMAIN)] is both
        # When all under the old one has expired, it goes, and nothing was ever without a path.
        for _ in range(60):
            await after(20)
            assert world.svid(GATEWAY)
        assert world.sections[bundle_key(DOMAIN)].roots_pem.count("BEGIN") == 1
        assert world.sections[bundle_key(DOMAIN)] != old


@on_virtual_loop
async def test_what_an_agent_leaves_to_the_next(tmp_path):
    async with world_in(tmp_path) as world:
        world.place(("cart-1", "cart"))
        await settled()
        held, gateway = world.svid(CART), world.svid(GATEWAY)
        world.down = True
        file = tmp_path / "svids.json"
        assert file.stat().st_mode & 0o777 == 0o600

        def next_agent(now=world.now):
            sections = {}
            svids = Svids(world, DOMAIN, world.file, now)
            svids.attach(lambda put, remove: sections.update(put))
            workload = WorkloadSection(
                "shop", "c", ("10.0.0.1",), "a", True, "cart", spiffe_id=CART
            )
            svids.workloads_changed({workload_key("shop", "c"): workload}, ())
            return sections

        sections = next_agent()
        assert sections[svid_key(CART)] == held
        assert sections[svid_key(GATEWAY)] == gateway
        assert isinstance(sections[bundle_key(DOMAIN)], TrustBundleSection)
        # What has expired is none.
        assert svid_key(CART) not in next_agent(lambda: held.not_after + 1)
        # Nor is what others could have read or written.
        file.chmod(0o644)
        assert not any(isinstance(one, SvidSection) for one in next_agent().values())
        file.chmod(0o600)
        assert svid_key(CART) in next_agent()
        content = file.read_bytes()
        for damaged in (b"", b"garbage", content[:-10], content.replace(b"BEGIN", b"BEGUN")):
            file.write_bytes(damaged)
            assert not any(isinstance(one, SvidSection) for one in next_agent().values())


# --- with processes ------------------------------------------------------------------------------


@on_virtual_loop
async def test_what_cannot_be_left_to_the_next_is_told(tmp_path):
    """As on a full disk."""
    async with world_in(tmp_path) as world:
        (tmp_path / "svids.new").mkdir()
        await after(600)
        assert world.svid(GATEWAY)
        (told,) = world.svids.degraded()
        assert "svids.json cannot be written" in told
        (tmp_path / "svids.new").rmdir()
        await after(600)
        assert world.svids.degraded() == []


@on_virtual_loop
async def test_what_was_left_has_expired_when_it_is_wanted(tmp_path):
    async with world_in(tmp_path) as world:
        world.place(("cart-1", "cart"))
        await settled()
        assert world.svid(CART)
        sections, moment = {}, world.now()
        late = Svids(world, DOMAIN, world.file, lambda: moment)
        late.attach(lambda put, remove: sections.update(put))
        moment += LIFE + 1
        put = {workload_key("shop", "cart-1"): workload("cart-1", "cart")}
        late.workloads_changed(put, ())
        assert svid_key(CART) not in sections


def test_an_agent_and_its_authority(tmp_path):
    """Through the lives and deaths of both workers keep what they have; nothing tells a key."""
    with authority_in(tmp_path) as authority:
        authority.write("pods", pod("cart-1", "a", "cart"), pod("web-1", "b", "web"))
        authority.start()
        with running(
            tmp_path / "run",
            f"--manifests={authority.manifests}",
            "--workers=1",
            "--admin=off",
            "--node=a",
            f"--authority={authority.nodes['a']}",
        ) as weft:
            status = weft.await_status(lambda status: status["ready"])
            assert {one["spiffeId"] for one in status["svids"]} == {CART, GATEWAY}
            assert all(one["why"] == "" and one["notAfter"] for one in status["svids"])
            for pid in (authority.process.pid, status["agent"]["pid"]):
                limits = Path(f"/proc/{pid}/limits").read_text()
                assert re.search(r"Max core file size +0 +0 ", limits)
            config = weft.ask("/config")
            assert config["sections"][svid_key(CART)]["key_pem"] == "<redacted>"
            assert config["sections"][bundle_key(DOMAIN)]["roots_pem"]

            metrics = {
                one["labels"]["spiffe_id"]: one["value"]
                for one in weft.ask("/metrics-json")["items"]
                if one["name"] == "weft_svid_expiry_seconds"
            }
            assert set(metrics) == {CART, GATEWAY}
            assert all(3000 < value <= 3600 for value in metrics.values())

            authority.end(kill=True)
            os.kill(status["agent"]["pid"], signal.SIGKILL)
            after_it = weft.await_status(
                lambda now: (
                    now["agent"]["pid"] != status["agent"]["pid"]
                    and now["ready"]
                    and now["degraded"]
                )
            )
            assert any("does not answer" in text for text in after_it["degraded"])
            assert weft.ask("/config")["sections"][svid_key(CART)]["chain_pem"]
            # The worker never was without.
            whole = weft.ask("/certs")
            chain = whole["identities"][0]["certificates"][0]["pem"]
            assert chain in config["sections"][svid_key(CART)]["chain_pem"]

            authority.start()
            weft.await_status(lambda now: now["ready"] and not now["degraded"])

            told = [weft.ask(path) for path in ("/status", "/config", "/certs", "/metrics-json")]
            told += [weft.ask("/objects", kind="Pod"), weft.said, authority.said]
            assert "PRIVATE" not in str(told)
            keys = re.findall(
                r"[A-Za-z0-9+/=]{64}", _keys((tmp_path / "run/svids.json").read_text())
            )
            assert len(keys) >= 2
            assert not [key for key in keys if key in str(told)]


def _keys(text):
    return "".join(part.split("END PRIVATE")[0] for part in text.split("BEGIN PRIVATE KEY")[1:])


def test_commands(tmp_path):
    def weft_command(*arguments):
        done = CliRunner().invoke(cli, [*arguments, "--run-dir", str(tmp_path / "run")])
        assert "PRIVATE" not in done.output
        return done

    with authority_in(tmp_path) as authority:
        authority.write("pods", pod("cart-1", "a", "cart"))
        authority.start()
        with running(
            tmp_path / "run",
            f"--manifests={authority.manifests}",
            "--workers=1",
            "--admin=off",
            "--node=a",
            f"--authority={authority.nodes['a']}",
        ) as weft:
            weft.await_status(lambda status: status["ready"])
            listed = weft_command("certs", "list")
            assert listed.exit_code == 0
            assert re.search(
                rf"{CART} +shop/cart-1 +Weft intermediate .* +59m5\ds +ok", listed.output
            )
            assert "the gateway's" in listed.output
            status = weft_command("status")
            assert re.search(rf"{CART} +shop/cart-1 ", status.output)
            shown = weft_command("certs", "show", "shop/cart-1")
            assert f"names:   {CART}\n" in shown.output
            assert shown.output.count("issuer:") == 2
            pem = weft_command("certs", "show", CART, "-o", "pem").output
            roots = weft_command("certs", "show", DOMAIN, "-o", "pem").output
            bundles = {DOMAIN: Bundle.from_pem(DOMAIN, roots)}
            assert str(peer_identity(chain_der(pem), bundles, time.time())) == CART
            none = weft_command("certs", "show", "nobody")
            assert none.exit_code == 1
