"""The filter on each pod's interface: attached with the maps it reads, checked, taken away.

    pod_egress      packets from the pod: ingress of the veth's end on the node
    pod_ingress     packets to the pod: egress of that end

Works in the network namespace of the node. An attachment is a pinned tcx link: it lives without us,
and ends with the interface, while its pin stays until it is removed. Knows nothing of how pods get
their interfaces.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bpf import pins, syscall
from bpf.attach import open_program, opened
from bpf.errors import DatapathError
from bpf.layout import Address, Addresses, Number
from bpf.maps import PinnedMap
from bpf.programs import PROGRAMS

FILTERS = ("pod_egress", "pod_ingress")
_SO_NETNS_COOKIE = 71


class Pod(NamedTuple):
    """`interface` is the name of the veth's end on the node; `addresses` an IPv4 and an IPv6."""

    interface: str
    addresses: tuple[str, str]


def is_loaded(directory: Path) -> bool:
    """Whether the loader has pinned the filter in this pin directory."""
    return all(pins.program_path(directory, name).exists() for name in FILTERS)


def netns_cookie() -> int:
    """Of the network namespace that this thread is in (socket(7), SO_NETNS_COOKIE)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        cookie = here.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int.from_bytes(cookie, sys.byteorder)


def attach(directory: Path, pod: Pod, cookie: int) -> None:
    """Filter what the pod sends and gets from now on; `cookie` is its network namespace's.
    DatapathError: what could not be done; `detach` undoes the rest."""
    index = socket.if_nametoindex(pod.interface)
    with _maps(directory) as maps, _explained(pod, "attach the filter to"):
        for address in pod.addresses:
            maps.interfaces.put(Address.of(address), Number(index))
        maps.namespaces.put(Number(cookie), _packed(pod))
        for name in FILTERS:
            path = pins.link_path(directory, _link(pod, name))
            path.unlink(missing_ok=True)
            with opened(open_program(directory, name)) as program:
                attach_type = PROGRAMS[name].attach_type
                with opened(syscall.link(program, index, attach_type)) as link:
                    syscall.pin(link, str(path))


def check(directory: Path, pod: Pod, cookie: int) -> str | None:
    """What is not as `attach` made it, None: nothing. DatapathError: that cannot be told."""
    index = socket.if_nametoindex(pod.interface)
    with _maps(directory) as maps, _explained(pod, "look at the filter of"):
        for name in FILTERS:
            if _attached(directory, pod, name) != index:
                return f"the filter {name} is not attached to {pod.interface}"
        for address in pod.addresses:
            if maps.interfaces.get(Address.of(address)) != Number(index):
                return f"the filter does not know {address} behind {pod.interface}"
        if maps.namespaces.get(Number(cookie)) != _packed(pod):
            return "the filter does not know the network namespace"
    return None


def detach(directory: Path, pod: Pod) -> None:
    """Undo `attach`, whatever is left of it, after the interface has gone. Entries of another pod
    that has the addresses now stay. DatapathError."""
    for name in FILTERS:
        pins.link_path(directory, _link(pod, name)).unlink(missing_ok=True)
    if not is_loaded(directory):
        return
    with _maps(directory) as maps, _explained(pod, "remove the filter of"):
        live = {index for index, _ in socket.if_nameindex()}
        addresses = [Address.of(address) for address in pod.addresses]
        for address in addresses:
            found = maps.interfaces.get(address)
            if found is not None and found.value not in live:
                maps.interfaces.remove(address)
        if all(maps.interfaces.get(address) is None for address in addresses):
            gone = [key for key, value in maps.namespaces.items() if value == _packed(pod)]
            for key in gone:
                maps.namespaces.remove(key)


def take_over(directory: Path) -> None:
    """What the maps of another version of Weft know of pods. DatapathError."""
    for version in pins.other_versions(directory):
        for name in ("interfaces", "namespaces"):
            _take_over(version / name, pins.map_path(directory, name))


def renew(directory: Path) -> None:
    """Put the programs that are pinned now in the place of those attached to pods, at once, where
    their maps know the pod; what is in the maps is in force from then on. What another version of
    Weft knows of pods and of their flows is taken over. DatapathError."""
    take_over(directory)
    flows = [version / "flows" for version in pins.other_versions(directory)]
    own_flows = pins.map_path(directory, "flows")
    for other in flows:
        _take_over(other, own_flows)
    with _maps(directory) as maps:
        known = {index.value for _, index in maps.interfaces.items()}
    for name in FILTERS:
        with opened(open_program(directory, name)) as program:
            for path in (directory / "links").glob(f"*_{name}"):
                with opened(syscall.pinned(str(path))) as link:
                    if syscall.tcx_link(link).interface in known:
                        syscall.update_link(link, program)
    # Those that were opened meanwhile.
    for other in flows:
        _take_over(other, own_flows)


def _take_over(other: Path, own: Path) -> None:
    """Entries that are not there yet, if both maps have the same layout."""
    try:
        source = syscall.pinned(str(other))
    except FileNotFoundError:
        return
    with opened(source), opened(syscall.pinned(str(own))) as sink:
        info = syscall.map_info(source)
        if info != syscall.map_info(sink):
            return
        key = syscall.next_key(source, None, info.key_size)
        while key is not None:
            value = syscall.lookup(source, key, info.value_size)
            if value is not None and syscall.lookup(sink, key, info.value_size) is None:
                syscall.update(sink, key, value)
            key = syscall.next_key(source, key, info.key_size)


class _Maps:
    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.interfaces = PinnedMap(directory, "interfaces", Address, Number)
        stack.callback(self.interfaces.close)
        self.namespaces = PinnedMap(directory, "namespaces", Number, Addresses)
        stack.callback(self.namespaces.close)


@contextlib.contextmanager
def _maps(directory: Path) -> Iterator[_Maps]:
    with contextlib.ExitStack() as stack:
        yield _Maps(directory, stack)


@contextlib.contextmanager
def _explained(pod: Pod, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatapathError(
            f"cannot {what} {pod.interface}: {error.strerror}: it takes root (CAP_BPF and "
            "CAP_NET_ADMIN) and a kernel with tcx (6.6)"
        ) from error


def _link(pod: Pod, name: str) -> str:
    return f"{pod.interface}_{name}"


def _packed(pod: Pod) -> Addresses:
    v4, v6 = (Address.of(address).packed for address in pod.addresses)
    return Addresses(v4, v6)


def _attached(directory: Path, pod: Pod, name: str) -> int | None:
    """The index of the interface that the pinned program filters; None: the link is gone or has
    another program."""
    try:
        link = syscall.pinned(str(pins.link_path(directory, _link(pod, name))))
    except FileNotFoundError:
        return None
    with opened(link), opened(open_program(directory, name)) as program:
        found = syscall.tcx_link(link)
        wanted = syscall.program_id(program), PROGRAMS[name].attach_type
        return found.interface if (found.program, found.attach_type) == wanted else None
