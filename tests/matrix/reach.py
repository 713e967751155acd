"""Who reaches whom: every pair, port and protocol, asked by real connections and of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from policy_model import Manifest, World

from matrix.prober import TCP_PORTS, UDP_PORTS, version_of
from matrix.scene import Place, Scene

# What must not come is waited for so long, after what may come has come. What comes later still is
# seen by who gets it.
WAIT_S = 0.3


class Probe(NamedTuple):
    source: Place
    destination: Place
    protocol: str
    port: int
    own: str
    address: str

    def __str__(self) -> str:
        return (
            f"{self.source.name} ({self.own}) -> {self.destination.name} ({self.address})"
            f" {self.protocol} {self.port}"
        )

    def meant(self, model: World) -> bool:
        source = self.source.party(self.destination, self.own)
        destination = self.destination.party(self.source, self.address)
        return model.allowed(source, destination, self.protocol, self.port)


class Found(NamedTuple):
    """What a round came to. `wrong`: disagreements, in words."""

    allowed: int
    denied: int
    wrong: list[str]


def probes(places: list[Place]) -> list[Probe]:
    """Where at least one end is a pod."""
    return [
        Probe(source, destination, protocol, port, own, address)
        for source in places
        for destination in places
        if source.pod or destination.pod
        for own, address in _addresses(source, destination)
        for protocol, port in _what(version_of(address))
    ]


def _addresses(source: Place, destination: Place) -> Iterator[tuple[str, str]]:
    for own in source.addresses:
        for address in destination.addresses:
            if version_of(own) == version_of(address):
                yield own, address


def _what(version: int) -> Iterator[tuple[str, int]]:
    # A connection to a pod of another node is a handshake of the nodes: not all of them twice.
    yield from (("TCP", port) for port in TCP_PORTS[: 3 if version == 4 else 1])
    yield from (("UDP", port) for port in UDP_PORTS)
    yield ("ICMP", 8) if version == 4 else ("ICMPv6", 128)


class Matrix:
    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._probes = probes(scene.places)
        self._round = 0
        # What each round's probes were meant to be: what arrives late is wrong as well.
        self._meant: dict[int, list[bool]] = {}

    def run(self, policies: list[Manifest]) -> Found:
        """Put policies in force, and probe everything once."""
        self._scene.enforce(policies)
        return self.probe(policies)

    def probe(self, policies: list[Manifest]) -> Found:
        model = self._scene.model(policies)
        self._round += 1
        meant = self._meant[self._round] = [one.meant(model) for one in self._probes]
        orders: dict[str, Any] = {}
        for number, (one, hope) in enumerate(zip(self._probes, meant, strict=True)):
            order = orders.setdefault(
                one.source.name, {"round": self._round, "wait": WAIT_S, "probes": []}
            )
            order["probes"].append([number, one.protocol, one.own, one.address, one.port, hope])
        answers = self._scene.all_at_once(orders)
        outcomes = {
            int(number): outcome
            for answer in answers.values()
            for number, outcome in answer["outcomes"].items()
        }
        wrong = [
            f"{one}: {outcomes[number]}, though it is {'allowed' if meant[number] else 'denied'}"
            for number, one in enumerate(self._probes)
            if (outcomes[number] == "answered") != meant[number]
            # Who is refused by TCP is told at once.
            or (one.protocol == "TCP" and outcomes[number] == "silent")
        ]
        for name, answer in answers.items():
            wrong += self._arrived(name, answer["seen"])
        return Found(sum(meant), len(meant) - sum(meant), wrong)

    def late(self) -> list[str]:
        """What has arrived since the last round, and should not."""
        answers = self._scene.all_at_once({name: {"seen": 1} for name in self._scene.controls})
        return [
            text for name, answer in answers.items() for text in self._arrived(name, answer["seen"])
        ]

    def _arrived(self, name: str, seen: list[tuple[str, float]]) -> Iterator[str]:
        for text, _ in seen:
            number, _, probe = text.partition(":")
            place = int(probe.rpartition(">")[2])
            one = self._probes[place]
            if one.destination.name != name:
                yield f"{one}: arrived at {name}"
            elif not self._meant[int(number)][place]:
                yield f"{one}: arrived in round {number}, though it is denied"
