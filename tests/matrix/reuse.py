"""An address that is given out again: for how long another node takes the new pod for the old one.

A pod of node a sends datagrams to one of node b, whose policy lets in the old pod and not the new
one. Both have the same address; that the one is gone and the other there is written at once. What
comes after that comes by the old one's rights, without a tunnel that could tell.
"""

from __future__ import annotations

import time

from lab_world import until
from policy_model import Manifest

from matrix.scene import PodsFile, Scene

SOURCE, DESTINATION = "c/p0", "c/p1"
_EVERY_S = 0.002
ONLY_THE_OLD: Manifest = {
    "kind": "CiliumClusterwideNetworkPolicy",
    "metadata": {"name": "only-the-old"},
    "spec": {
        "endpointSelector": {"matchLabels": {"io.kubernetes.pod.namespace": "c", "app": "y"}},
        "ingress": [{"fromEndpoints": [{"matchLabels": {"app": "x"}}]}],
    },
}


def windows_s(scene: Scene, times: int) -> list[float]:
    """Of each time, how long after the change the last datagram came; 0: none came."""
    scene.enforce([ONLY_THE_OLD])
    source, destination = scene.place(SOURCE), scene.place(DESTINATION)
    file, number = scene.pods_file(source.node), 0
    pod = file.at(source.addresses[0])
    old = dict(pod["metadata"])
    marks = {"policies": scene.written}
    target = [0, "UDP", source.addresses[0], destination.addresses[0], 53]
    scene.all_at_once({SOURCE: {"stream": [target], "every": _EVERY_S}})
    found = []
    try:
        for _ in range(times):
            pod["metadata"] = old
            number = _put(scene, file, number, marks)
            scene.seen_at(DESTINATION)
            _until_one_comes(scene)
            pod["metadata"] = {**old, "name": f"new-{number}", "uid": f"new-{number}", "labels": {}}
            changed = time.monotonic()
            number = _put(scene, file, number, marks)
            came = [when for _, when in scene.seen_at(DESTINATION)]
            found.append(max([0.0, *(when - changed for when in came)]))
            assert not scene.seen_at(DESTINATION), "datagrams come though the change is in force"
    finally:
        scene.all_at_once({SOURCE: {"stop": 1}})
        file.restore()
    scene.until_in_force(marks)
    return found


def _put(scene: Scene, file: PodsFile, number: int, marks: dict[str, int]) -> int:
    file.write(number + 1)
    scene.until_in_force({**marks, "a": number + 1})
    return number + 1


def _until_one_comes(scene: Scene) -> None:
    until(lambda: bool(scene.seen_at(DESTINATION)))
