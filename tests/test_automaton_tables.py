"""Tables in the kernel: their arenas, generations, and that they follow the configuration."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping

import pytest
from automaton_world import kernel
from bpf_world import needs_bpf

from bpf import layout, syscall
from bpf.automaton import Automata
from bpf.constants import AUTOMATA
from bpf.maps import open_pinned
from bpf.structs import AutomatonPlace, Number
from l7proxy.automaton import compile_rules
from l7proxy.automaton_plan import plan
from l7proxy.automaton_plans import Plans
from l7proxy.automaton_rules import Limits, Rule
from l7proxy.native import Judged
from l7proxy.routing import RouteIndex
from mesh.agent.automata import KernelAutomata
from mesh.model.nodeconfig import (
    ClusterSection,
    Endpoint,
    Section,
    ServiceSection,
    Settings,
    WorkloadSection,
)
from mesh.model.policyconfig import Direction, HttpRule, PolicyRule, PolicySection
from mesh.model.routeconfig import (
    Attachment,
    PathMatch,
    RouteMatch,
    RouteRule,
    RouteSection,
    ValueMatch,
)
from mesh.model.routeconfig import WeightedBackend as Backend
from mesh.model.section import SETTINGS_KEY

LIMITS = Limits(8000, 100, None)
CLUSTER = "cluster/Service/shop/cart/80"
LISTENER = "Service/shop/cart/80"
GET = b"GET /a HTTP/1.1\r\nHost: cart\r\n\r\n"
POST = GET.replace(b"GET", b"POST")


@pytest.fixture
def real(tmp_path):
    with kernel(tmp_path) as one:
        yield one


def a_table(generation: int, verdict: int, size: int = 0) -> bytes:
    automaton = compile_rules([[Rule((), verdict)]], LIMITS, generation)
    return automaton.table + bytes(4 * size)


@needs_bpf
def test_a_table_is_in_force_until_it_is_removed(real):
    real.automata.put(1, a_table(1, 7))
    real.automata.put(2, a_table(2, 8))
    assert real.automata.generations() == {1, 2}
    assert (real.judge(1, GET).rule, real.judge(2, GET).rule) == (7, 8)
    real.automata.remove(1)
    assert (real.judge(1, GET), real.judge(2, GET).rule) == (Judged(), 8)
    real.automata.remove(1)
    assert real.automata.generations() == {2}


@needs_bpf
def test_arenas_are_let_go_with_their_last_table(real):
    """Large tables, each but the last in an arena of its own; and one who comes after another."""
    for generation in range(1, 6):
        real.automata.put(generation, a_table(generation, generation, size=(1 << 19) - 40_000))
    assert len(list(real.automata._indices())) == 3
    assert [real.judge(one, GET).rule for one in range(1, 6)] == [1, 2, 3, 4, 5]
    with contextlib.closing(Automata(real.directory)) as after:
        assert after.generations() == {1, 2, 3, 4, 5}
        after.put(6, a_table(6, 9))
        for generation in (1, 2, 4):
            after.remove(generation)
        assert len(list(after._indices())) == 3
        assert [real.judge(one, GET).rule for one in range(1, 7)] == [0, 0, 3, 0, 5, 9]


@needs_bpf
def test_a_place_in_an_arena_that_is_another_by_now(real):
    """Who looked the place up before finds no table of another generation there."""
    real.automata.put(1, a_table(2, 7))
    assert real.judge(1, GET) == Judged()


# --- the agent ------------------------------------------------------------------------------------


def route(path: str) -> RouteSection:
    rule = RouteRule((RouteMatch(PathMatch("PathPrefix", path)),), backends=(Backend(CLUSTER),))
    attachment = Attachment(LISTENER, ("*",))
    return RouteSection("HTTPRoute", "shop", "cart", "", (attachment,), (rule,))


def pod(name: str, address: str, identity: int) -> WorkloadSection:
    return WorkloadSection("shop", name, (address,), "here", local=True, identity=identity)


def policy(method: str) -> PolicySection:
    rule = PolicyRule("CiliumNetworkPolicy shop/cart ingress[0]", http=(HttpRule(method),))
    ingress = Direction(default_deny=True, selected_by=("shop/cart",), rules=(rule,))
    return PolicySection("shop", "cart-0", 2, ("10.0.0.2",), ingress)


SECTIONS: dict[str, Section] = {
    LISTENER.lower(): ServiceSection("shop", "cart", 80, ("10.96.0.1",), CLUSTER, producers=True),
    CLUSTER: ClusterSection((Endpoint("10.0.0.2", 8080), Endpoint("10.0.9.9", 8080))),
    "workload/shop/web-0": pod("web-0", "10.0.0.1", 1),
    "workload/shop/cart-0": pod("cart-0", "10.0.0.2", 2),
    "route/HTTPRoute/shop/cart": route("/a"),
}


def of_worker(sections: Mapping[str, Section], *asked) -> int:
    """What a worker comes to (l7proxy.pairs)."""
    routes = RouteIndex()
    routes.put("route/HTTPRoute/shop/cart", sections["route/HTTPRoute/shop/cart"])
    return plan(LISTENER, routes, asked or ((), ()), Settings()).generation


def test_an_agent_plans_what_its_workers_ask_for():
    plans = Plans(SECTIONS)
    straight = plan("", RouteIndex(), ((), ()), Settings()).generation
    assert plans.all().keys() == {straight, of_worker(SECTIONS)}
    # A policy's rules, for who may come; endpoints of other nodes are nothing to the kernel.
    assert plans.apply({"policy/shop/cart-0": policy("GET")}, ())
    rules = policy("GET").ingress.rules
    judged = plan("", RouteIndex(), ((), rules), Settings()).generation
    routed = of_worker(SECTIONS), of_worker(SECTIONS, (), rules)
    assert plans.all().keys() == {straight, judged, *routed}
    # What no pod of this node is asked for is nothing to this kernel.
    plans.apply({CLUSTER: ClusterSection((Endpoint("10.0.9.9", 8080),))}, ())
    assert plans.all().keys() == {straight}
    plans.apply({CLUSTER: SECTIONS[CLUSTER]}, ("policy/shop/cart-0",))
    assert plans.all().keys() == {straight, of_worker(SECTIONS)}
    assert plans.apply({}, ("route/HTTPRoute/shop/cart",))
    assert of_worker(SECTIONS) not in plans.all()
    assert not plans.apply({}, ("node/other",))


@needs_bpf
async def test_the_kernel_follows_the_configuration(real):
    automata = KernelAutomata(real.directory)
    automata.publish(SECTIONS, ())
    automata.open()
    work = asyncio.create_task(automata.run())  # noqa: TID251
    before = of_worker(SECTIONS)
    await _until(lambda: before in automata.in_force)
    assert real.judge(before, GET).rule == 1

    changed = {"route/HTTPRoute/shop/cart": route("/b")}
    automata.publish(changed, ())
    # It is planned in a thread: what others have to do meanwhile is not kept waiting.
    assert real.judge(before, GET).rule == 1
    await _until(lambda: before not in automata.in_force)
    assert real.judge(before, GET) == Judged()
    after = of_worker({**SECTIONS, **changed})
    await _until(lambda: after in automata.in_force)
    assert real.judge(after, GET) == Judged()
    assert real.judge(after, GET.replace(b"/a", b"/b")).rule == 1

    automata.publish({"policy/shop/cart-0": policy("GET")}, ())
    rules = policy("GET").ingress.rules
    judging = of_worker({**SECTIONS, **changed}, (), rules)
    await _until(lambda: judging in automata.in_force)
    get, post = (one.replace(b"/a", b"/b") for one in (GET, POST))
    assert real.judge(judging, get, 0, 1) == Judged(1, 0, 1, len(get))
    assert real.judge(judging, post, 0, 1) == Judged()
    automata.publish({"policy/shop/cart-0": policy("POST")}, ())
    await _until(lambda: judging not in automata.in_force)
    assert real.judge(judging, get, 0, 1) == Judged()
    rejudging = of_worker({**SECTIONS, **changed}, (), policy("POST").ingress.rules)
    await _until(lambda: rejudging in automata.in_force)

    work.cancel()
    automata.close()
    # What an agent leaves stays in force; the next one takes away what is not planned any more.
    assert real.judge(after, get).rule == 1
    following = KernelAutomata(real.directory)
    following.publish({}, ())
    following.open()
    assert real.judge(after, get).rule == 1
    work = asyncio.create_task(following.run())  # noqa: TID251
    await _until(lambda: after not in following.in_force)
    assert real.judge(after, get) == Judged()
    work.cancel()
    following.close()


@needs_bpf
async def test_steps_that_come_while_plans_are_made_are_all_taken_in_order(real):
    """Also those that change nothing here, and what is compiled meanwhile for what was planned."""
    automata = KernelAutomata(real.directory)
    automata.open()
    work = asyncio.create_task(automata.run())  # noqa: TID251
    automata.publish(SECTIONS, ())
    for number in range(20):
        automata.publish({"route/HTTPRoute/shop/cart": route(f"/{number}")}, ())
        automata.publish({}, ("node/other",))
        await asyncio.sleep(0)
    last = {**SECTIONS, "route/HTTPRoute/shop/cart": route("/19")}
    asked = {of_worker(last), plan("", RouteIndex(), ((), ()), Settings()).generation}
    await _until(lambda: automata.in_force == asked)
    assert real.judge(of_worker(last), GET.replace(b"/a", b"/19")).rule == 1
    work.cancel()
    automata.close()


@needs_bpf
async def test_what_the_kernel_does_not_take_is_not_said_to_be_in_force(real):
    """It says why, and is tried again when the configuration changes."""
    places = open_pinned(real.directory, "automata")
    others = [layout.U64.pack(Number(2 * number)) for number in range(1, AUTOMATA)]  # but one
    for one in others:
        syscall.update(places, one, layout.AUTOMATON_PLACE.pack(AutomatonPlace(0, 0)))
    automata = KernelAutomata(real.directory)
    automata.open()
    automata.in_force.clear()  # so that they are not taken away
    automata.publish(SECTIONS, ())
    work = asyncio.create_task(automata.run())  # noqa: TID251
    straight, asked = plan("", RouteIndex(), ((), ()), Settings()).generation, of_worker(SECTIONS)
    await _until(lambda: automata.refused)
    assert (automata.in_force, automata.refused.keys()) == ({straight}, {asked})
    assert real.judge(asked, GET) == Judged()
    assert automata.rules() == {"HTTPRoute/shop/cart rule 0": automata.refused[asked]}

    for one in others:
        syscall.delete(places, one)
    automata.publish({"route/HTTPRoute/shop/cart": route("/a")}, ())
    await _until(lambda: asked in automata.in_force)
    assert not automata.refused
    assert automata.rules() == {"HTTPRoute/shop/cart rule 0": ""}
    assert real.judge(asked, GET).rule == 1
    work.cancel()
    automata.close()
    os.close(places)


@needs_bpf
async def test_what_cannot_be_planned_or_compiled_is_the_proxys_and_all_else_is_not(real):
    automata = KernelAutomata(real.directory)
    automata.open()
    work = asyncio.create_task(automata.run())  # noqa: TID251
    automata.publish(SECTIONS, ())
    asked = of_worker(SECTIONS)
    await _until(lambda: asked in automata.in_force)
    automata.publish({SETTINGS_KEY: Settings(max_head_bytes="many")}, ())
    await _until(lambda: automata.failed)
    assert automata.in_force == set()
    assert real.judge(asked, GET) == Judged()

    automata.publish({SETTINGS_KEY: Settings(max_headers="many")}, ())
    await _until(lambda: len(automata.refused) == 2)
    assert (automata.in_force, automata.failed) == (set(), "")
    (why,) = automata.rules().values()
    assert why.startswith("it cannot be compiled: ")

    # A section that cannot be taken keeps none of the others.
    broken = {"policy/shop/cart-0": policy("\ud800")}
    automata.publish({SETTINGS_KEY: Settings(), **broken}, ())
    await _until(lambda: asked in automata.in_force)
    assert automata.rules() == {"HTTPRoute/shop/cart rule 0": ""}
    work.cancel()
    automata.close()


@needs_bpf
async def test_rules_that_are_not_all_in_the_tables_are_not_said_to_be_the_kernels(real):
    """Nor by an agent that comes after the one that compiled them."""
    match = RouteMatch(headers=(ValueMatch("cookie", "a=1"),))
    rule = RouteRule((match,), backends=(Backend(CLUSTER),))
    attachment = Attachment(LISTENER, ("*",))
    cookie = RouteSection("HTTPRoute", "shop", "cart", "", (attachment,), (rule,))
    sections = {**SECTIONS, "route/HTTPRoute/shop/cart": cookie}
    for _ in range(2):
        automata = KernelAutomata(real.directory)
        automata.open()
        work = asyncio.create_task(automata.run())  # noqa: TID251
        automata.publish(sections, ())
        await _until(lambda found=automata: any(found.rules().values()))
        why = automata.rules()["HTTPRoute/shop/cart rule 0"]
        assert why.startswith("header cookie is a=1 is not for tables: ")
        work.cancel()
        automata.close()


async def _until(holds) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)
