"""Churn: policies and pods change many times a second under traffic, and what arrives is judged.

Pods send each other datagrams and lines of connections all the time. Each change is of one policy,
or of one pod: its labels, or another pod has got its address. For what has arrived there must be a
state that allows it among those that can have been in force while it was on its way: from the last
one that was known to be in force when it was sent to the last one that was written when it came. Of
pods of one node it is one state that lets it leave and lets it arrive; two nodes take up a change
each by itself.
"""

from __future__ import annotations

import bisect
import itertools
import random
import threading
import time
from typing import Any, NamedTuple

import policy_cases as cases
from policy_model import Manifest, Pod, World

from matrix.prober import TCP_PORTS, UDP_PORTS
from matrix.scene import Place, Scene
from matrix.sets import generate

# Policies at once.
_HELD = 5
# Between two datagrams to the same target.
_EVERY_S = 0.05


class State(NamedTuple):
    """`written`: when it began to be; `marks`: the number of the state with which each file was
    written last."""

    written: float
    marks: dict[str, int]
    pods: dict[str, Pod]
    policies: list[Manifest]


class Target(NamedTuple):
    source: Place
    destination: Place
    protocol: str
    port: int

    def __str__(self) -> str:
        what = f"{self.protocol} {self.port}"
        return f"{self.source.name} -> {self.destination.name} {what}"


class Evidence(NamedTuple):
    """`between`: how much of what arrived was let leave and let arrive by different states, of pods
    of two nodes. `lags_s`: of each change, how long until it was known to be in force. `wrong`:
    what should not have arrived, in words. `elsewhen`: how much that would be, had all come two
    seconds before it did: so it is known that it can be seen."""

    changes: int
    seconds: float
    sent: int
    arrived: int
    between: int
    lags_s: list[float]
    wrong: list[str]
    elsewhen: int

    def __str__(self) -> str:
        lags = sorted(1000 * lag for lag in self.lags_s)
        return (
            f"{self.changes} changes in {self.seconds:.0f} s, each known to be in force after"
            f" {lags[len(lags) // 2]:.0f} ms (median; {lags[-1]:.0f} ms the longest);"
            f" {self.sent} packets and lines sent, {self.arrived} arrived,"
            f" {len(self.wrong)} of them wrongly, {self.between} while the two nodes had different"
            " states in force"
        )


class Watch:
    """When each node was known to have which state in force."""

    def __init__(self, scene: Scene, states: list[State]) -> None:
        self._scene = scene
        self._states = states
        self._known: dict[str, list[tuple[float, dict[str, int]]]] = {"a": [], "b": []}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            for node, known in self._known.items():
                marks = self._scene.marks(node)
                if len(marks) == len(self._states[0].marks) and (
                    not known or known[-1][1] != marks
                ):
                    known.append((time.monotonic(), marks))

    def at(self, node: str, when: float) -> int:
        """The last state that was known to be in force then."""
        known = self._known[node]
        at = bisect.bisect_right(known, when, key=lambda one: one[0]) - 1
        return self._last(known[at][1]) if at >= 0 else 0

    def _last(self, marks: dict[str, int]) -> int:
        """The last state of which everything was written no later than this."""
        return min(
            bisect.bisect_right(self._states, number, key=lambda state: state.marks[file]) - 1
            for file, number in marks.items()
        )

    def lags_s(self) -> list[float]:
        """Of each change at each node, how long until it or a later one was known to be in
        force."""
        lags = []
        for known in self._known.values():
            upto = 0
            for when, marks in known:
                last = self._last(marks)
                lags += [when - state.written for state in self._states[upto + 1 : last + 1]]
                upto = max(upto, last)
        return lags


class Churn:
    def __init__(self, scene: Scene, seed: int) -> None:
        self._scene = scene
        self._random = random.Random(seed)
        found = generate(seed, 8)
        self._pool = [policy for policies in found for policy in policies]
        self._names = itertools.count()
        self._pods = {p.name: p.pod for p in scene.places if p.pod is not None}
        self._policies = [self._new_policy() for _ in range(_HELD)]
        self._files = {node: scene.pods_file(node) for node in "ab"}
        self.states: list[State] = []
        pods = [place for place in scene.places if place.pod is not None]
        self._targets = [
            Target(one, other, protocol, port)
            for one in pods
            for other in pods
            if one is not other
            for protocol, port in (
                *(("UDP", port) for port in UDP_PORTS),
                ("TCP", TCP_PORTS[0]),
            )
        ]

    def run(self, seconds: float, rate: float) -> Evidence:
        """So many changes a second."""
        scene = self._scene
        self._write("policies", "a", "b")
        scene.until_in_force(self.states[0].marks)
        scene.all_at_once({place: {"seen": 1} for place in scene.controls})
        with Watch(scene, self.states) as watch:
            self._start()
            started = due = time.monotonic()
            while (now := time.monotonic()) < started + seconds:
                if now < due:
                    time.sleep(due - now)  # the pace, and nothing that is waited for
                due = max(due + 1 / rate, now)
                self._change()
            took = time.monotonic() - started
            names = [one.name for one in scene.places if one.pod is not None]
            stopped = scene.all_at_once({name: {"stop": 1} for name in names})
            scene.until_in_force(self.states[-1].marks)
            seen = scene.all_at_once({name: {"seen": 1} for name in names})
        for file in self._files.values():
            file.restore()
        sent = sum(sum(one["sent"].values()) for one in stopped.values())
        arrived = [(name, *one) for name, answer in seen.items() for one in answer["seen"]]
        judge = Judge(scene, self.states, watch, self._targets)
        between, wrong = judge.look(arrived)
        _, elsewhen = judge.look(arrived, earlier_s=2)
        return Evidence(
            changes=len(self.states) - 1,
            seconds=took,
            sent=sent,
            arrived=len(arrived),
            between=between,
            lags_s=watch.lags_s(),
            wrong=wrong,
            elsewhen=len(elsewhen),
        )

    def _start(self) -> None:
        orders: dict[str, Any] = {}
        for number, one in enumerate(self._targets):
            order = orders.setdefault(one.source.name, {"stream": [], "every": _EVERY_S})
            own, address = one.source.addresses[0], one.destination.addresses[0]
            order["stream"].append([number, one.protocol, own, address, one.port])
        self._scene.all_at_once(orders)

    # --- changes --------------------------------------------------------------------------------

    def _change(self) -> None:
        if self._random.random() < 0.4:
            node = self._random.choice("ab")
            self._change_pod(node)
            self._write(node)
        else:
            place = self._random.randrange(_HELD)
            self._policies = [*self._policies]
            self._policies[place] = self._new_policy()
            self._write("policies")

    def _write(self, *files: str) -> None:
        number = len(self.states)
        marks = {**(self.states[-1].marks if self.states else {}), **dict.fromkeys(files, number)}
        self.states.append(State(time.monotonic(), marks, self._pods, self._policies))
        for file in files:
            if file == "policies":
                self._scene.write(self._policies, number)
            else:
                self._files[file].write(number)

    def _new_policy(self) -> Manifest:
        policy = self._random.choice(self._pool)
        name = f"churn-{next(self._names)}"
        return {**policy, "metadata": {**policy["metadata"], "name": name}}

    def _change_pod(self, node: str) -> None:
        """Other labels, half of the time of another pod with the same addresses."""
        manifest = self._random.choice(self._files[node].pods)
        address = manifest["status"]["podIP"]
        (key,) = (key for key, pod in self._pods.items() if pod.address == address)
        labels = {"app": self._random.choice("xyz")}
        if self._random.random() < 0.5:
            labels["tier"] = "web"
        manifest["metadata"]["labels"] = labels
        if self._random.random() < 0.5:
            manifest["metadata"]["name"] = f"pod-{next(self._names)}"
        old = self._pods[key]
        new = Pod(
            old.namespace, manifest["metadata"]["name"], address, labels, old.account, old.ports
        )
        self._pods = {**self._pods, key: new}


class Judge:
    """What has arrived, against the states that can have been in force."""

    def __init__(
        self, scene: Scene, states: list[State], watch: Watch, targets: list[Target]
    ) -> None:
        self._scene = scene
        self._states = states
        self._watch = watch
        self._targets = targets
        self._worlds: dict[int, World] = {}
        self._decided: dict[tuple[int, int], tuple[bool, bool]] = {}

    def look(
        self, arrived: list[tuple[str, str, float]], earlier_s: float = 0
    ) -> tuple[int, list[str]]:
        """As if it had been sent and had come earlier: Evidence.between and Evidence.wrong."""
        wrong, between = [], 0
        for where, text, when in arrived:
            probe, _, at = text.removeprefix("~").partition("@")
            number = int(probe.rpartition(">")[2])
            target = self._targets[number]
            if target.destination.name != where:
                wrong.append(f"{target}: arrived at {where}")
                continue
            sent, came = float(at) - earlier_s, when - earlier_s
            sides = self._sides(target, number, sent, came)
            if any(all(one) for one in sides.values()):
                continue
            out, into = (any(one[side] for one in sides.values()) for side in (0, 1))
            if target.source.node != target.destination.node and out and into:
                between += 1
            else:
                wrong.append(
                    f"{target}: sent {sent:.3f}, came {came:.3f}, and no state of"
                    f" {min(sides)} to {max(sides)} allows it: {sides}"
                )
        return between, wrong

    def _sides(
        self, target: Target, number: int, sent: float, came: float
    ) -> dict[int, tuple[bool, bool]]:
        """Whether it may leave and arrive, by state."""
        first = min(self._watch.at(place.node, sent) for place in target[:2])
        last = bisect.bisect_right(self._states, came, key=lambda state: state.written) - 1
        last = max(first, last)
        return {state: self._decide(state, number) for state in range(first, last + 1)}

    def _decide(self, number: int, target: int) -> tuple[bool, bool]:
        known = self._decided.get((number, target))
        if known is None:
            state, one = self._states[number], self._targets[target]
            world = self._worlds.get(number)
            if world is None:
                services = self._scene.services
                pods = list(state.pods.values())
                world = World(pods, cases.NAMESPACES, state.policies, services)
                self._worlds[number] = world
            source, destination = (state.pods[place.name] for place in one[:2])
            known = world.sides(source, destination, one.protocol, one.port)
            self._decided[number, target] = known
        return known
