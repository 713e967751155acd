"""The filter on each pod's interface: attached with the maps it reads, checked, taken away.

    pod_egress      packets from the pod: ingress of the veth's end on the node
    pod_ingress     packets to the pod: egress of that end

Pods are recorded in files (a Pod each, by interface): `renew` attaches what is loaded to all of
them. Works in the network namespace of the node. An attachment is a pinned tcx link: it lives
without us, and ends with the interface, while its pin stays until it is removed. Knows nothing of
how pods get their interfaces.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import msgspec

from bpf import constants, pins, syscall
from bpf.attach import open_program, opened
from bpf.errors import DatapathError
from bpf.maps import PinnedMap
from bpf.programs import PROGRAMS
from bpf.structs import Address, Addresses, Identity, Number, Prefix, Who

FILTERS = ("pod_egress", "pod_ingress")
_SO_NETNS_COOKIE = 71
_NOBODY = Who(0, 0)
_NO_ADDRESS = bytes(16)
_ROOT = ": it takes root (CAP_BPF and CAP_NET_ADMIN)"
_ADVICE = {
    errno.EPERM: _ROOT,
    errno.EACCES: _ROOT,
    errno.EINVAL: ": it takes a kernel with tcx (6.6)",
    errno.E2BIG: f": a map of pods is full: a node has room for {constants.PODS} addresses",
}


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """`interface` is the name of the veth's end on the node; `addresses`: of each family one at
    most; `cookie` its network namespace's. `attachment` is whose it is for who made the network
    (CNI's container and interface), `about` the Pod, as namespace/name/uid; "": nobody says."""

    interface: str
    addresses: tuple[str, ...]
    cookie: int
    attachment: str = ""
    about: str = ""


def loaded(directory: Path) -> str | None:
    """The version whose filter is to be used: this one; until that is in force, the newest other
    that is; None: there is none."""
    found = [
        version
        for version in (pins.version(), *pins.other_versions(directory))
        if all(pins.program_path(directory, name, version).exists() for name in FILTERS)
    ]
    in_force = [version for version in found if pins.is_attached(directory, version)]
    return next(iter(in_force or found), None)


def netns_cookie() -> int:
    """Of the network namespace that this thread is in (socket(7), SO_NETNS_COOKIE)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        return netns_cookie_of(here)


def netns_cookie_of(here: socket.socket) -> int:
    """Of the network namespace of a socket."""
    cookie = here.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int.from_bytes(cookie, sys.byteorder)


def add(directory: Path, records: Path, pod: Pod) -> bool:
    """Record a pod, and filter what it sends and gets from now on; False: there is no filter yet,
    and nothing was done. DatapathError: what could not be done; `remove` undoes the rest."""
    with _explained(pod, "attach the filter to"), _locked(records):
        version = loaded(directory)
        if version is None:
            return False
        # A name is used again, and who had it may never have been removed.
        for old in _recorded(records):
            if old.interface == pod.interface and old.cookie != pod.cookie:
                _remove(directory, records, old)
        draft = _draft(records, pod.interface)
        draft.write_bytes(msgspec.json.encode(pod))
        draft.rename(_record(records, pod.interface))
        _know(directory, pod, version)
        _attach(directory, pod, version)
        return True


def check(directory: Path, pod: Pod) -> str | None:
    """What is not as it is once the filter is attached, None: nothing. DatapathError: that cannot
    be told."""
    with _maps(directory, loaded(directory)) as maps, _explained(pod, "look at the filter of"):
        index = socket.if_nametoindex(pod.interface)
        for name in FILTERS:
            if _attached(directory, pod, name) != index:
                return f"the filter {name} is not attached to {pod.interface}"
        for address in pod.addresses:
            if maps.interfaces.get(Address.of(address)) != Number(index):
                return f"the filter does not know {address} behind {pod.interface}"
        if maps.namespaces.get(Number(pod.cookie)) != _packed(pod):
            return "the filter does not know the network namespace"
    return None


def remove(directory: Path, records: Path, interface: str) -> None:
    """Undo `add`, whatever is left of it. Entries of another pod that has the addresses now stay.
    DatapathError."""
    with _locked(records):
        _detach(directory, interface)
        _draft(records, interface).unlink(missing_ok=True)
        for pod in _recorded(records):
            if pod.interface == interface:
                _remove(directory, records, pod)


def find(records: Path, attachment: str, cookie: int = 0) -> list[str]:
    """The interfaces that are recorded for an attachment; or, where nobody has said whose they are,
    for a network namespace."""
    return [
        pod.interface
        for pod in _recorded(records)
        if (pod.attachment == attachment if pod.attachment else pod.cookie == cookie)
    ]


def attachments(records: Path) -> list[str]:
    """All that are recorded for one."""
    return [pod.attachment for pod in _recorded(records) if pod.attachment]


def addresses(records: Path) -> set[str]:
    """Those of all pods that are recorded."""
    return {address for pod in _recorded(records) for address in pod.addresses}


def _recorded(records: Path) -> list[Pod]:
    found = []
    for record in sorted(records.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found.append(msgspec.json.decode(record.read_bytes(), type=Pod))
    return found


def _remove(directory: Path, records: Path, pod: Pod) -> None:
    with _explained(pod, "remove the filter of"):
        _detach(directory, pod.interface)
        for version in (pins.version(), *pins.other_versions(directory)):
            with contextlib.suppress(DatapathError), _maps(directory, version) as maps:
                _forget(maps, pod)
        _record(records, pod.interface).unlink()


def renew(directory: Path, records: Path) -> list[str]:
    """Attach the filter that is pinned now to all pods, at once in the place of one that is there.
    Returns what could not be done. DatapathError."""
    problems = []
    with _locked(records):
        live = {name for _, name in socket.if_nameindex()}
        found = _recorded(records)
        pods = [pod for pod in found if pod.interface in live]
        _remove_ended(directory, records, found, live)
        # A filter looks at the other end as well: all are known before any is attached.
        for step in (_know, _attach):
            for pod in pods:
                try:
                    with _explained(pod, "attach the filter to"):
                        step(directory, pod, pins.version())
                except DatapathError as error:
                    problems.append(str(error))
    return problems


def forget(records: Path) -> None:
    """Remove all records, once nothing is pinned any more. OSError."""
    for record in records.iterdir():
        record.unlink()
    records.rmdir()


def tidy(directory: Path, records: Path) -> None:
    """Remove what is left of CNI's pods of whose end nobody was told. DatapathError."""
    with _locked(records):
        live = {name for _, name in socket.if_nameindex()}
        _remove_ended(directory, records, _recorded(records), live)


def _remove_ended(directory: Path, records: Path, found: list[Pod], live: set[str]) -> None:
    for pod in found:
        if pod.about and pod.interface not in live:
            _remove(directory, records, pod)


def _know(directory: Path, pod: Pod, of: str) -> None:
    index = socket.if_nametoindex(pod.interface)
    with _maps(directory, of) as maps:
        for address in pod.addresses:
            maps.interfaces.put(Address.of(address), Number(index))
        maps.namespaces.put(Number(pod.cookie), _packed(pod))
        _change_pods(maps)


def _attach(directory: Path, pod: Pod, of: str) -> None:
    index = socket.if_nametoindex(pod.interface)
    for name in FILTERS:
        path = pins.link_path(directory, _link(pod.interface, name))
        with opened(open_program(directory, name, of)) as program:
            if path.exists():
                with opened(syscall.pinned(str(path))) as link:
                    if syscall.tcx_link(link).interface == index:
                        syscall.update_link(link, program)
                        continue
                path.unlink()
            with opened(syscall.link(program, index, PROGRAMS[name].attach_type)) as link:
                syscall.pin(link, path)


def _detach(directory: Path, interface: str) -> None:
    """The filters of an interface, which may be attached anew at once: the kernel takes none of two
    that are the same."""
    for name in FILTERS:
        path = pins.link_path(directory, _link(interface, name))
        with contextlib.suppress(FileNotFoundError):
            with opened(syscall.pinned(str(path))) as link:
                syscall.detach_link(link)
            path.unlink()


def _forget(maps: _Maps, pod: Pod) -> None:
    # Its own may be about to go.
    live = {index for index, name in socket.if_nameindex() if name != pod.interface}
    for address in map(Address.of, pod.addresses):
        found = maps.interfaces.get(address)
        if found is not None and found.value not in live:
            maps.interfaces.remove(address)
            # Whoever gets the address is nobody until the agent knows of it.
            whole = Prefix(8 * len(address.packed), address.packed)
            if maps.identities.get(whole) is not None:
                maps.identities.put(whole, Identity(0, *_NOBODY, *_NOBODY))
    maps.namespaces.remove(Number(pod.cookie))
    _change_pods(maps)


def _change_pods(maps: _Maps) -> None:
    """Flows are judged anew: those of a pod that has gone are no right of who gets its address."""
    with contextlib.suppress(OSError):  # another version may have no place for it
        maps.generation.put(Number(1), Number(time.monotonic_ns()))


def _record(records: Path, interface: str) -> Path:
    return records / f"{interface}.json"


def _draft(records: Path, interface: str) -> Path:
    return records / f"{interface}~"


@contextlib.contextmanager
def _locked(records: Path) -> Iterator[None]:
    """Nobody else adds, removes or renews meanwhile."""
    records.mkdir(parents=True, exist_ok=True, mode=0o700)
    with opened(os.open(records, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


class _Maps:
    def __init__(self, directory: Path, of: str | None, stack: contextlib.ExitStack) -> None:
        self.interfaces = PinnedMap(directory, "interfaces", Address, Number, of)
        stack.callback(self.interfaces.close)
        self.namespaces = PinnedMap(directory, "namespaces", Number, Addresses, of)
        stack.callback(self.namespaces.close)
        self.identities = PinnedMap(directory, "identities", Prefix, Identity, of)
        stack.callback(self.identities.close)
        self.generation = PinnedMap(directory, "generation", Number, Number, of)
        stack.callback(self.generation.close)


@contextlib.contextmanager
def _maps(directory: Path, of: str | None) -> Iterator[_Maps]:
    with contextlib.ExitStack() as stack:
        yield _Maps(directory, of, stack)


@contextlib.contextmanager
def _explained(pod: Pod, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        where = f" ({error.filename})" if error.filename else ""
        raise DatapathError(
            f"cannot {what} {pod.interface}{where}: {error.strerror}{advice}"
        ) from error


def _link(interface: str, name: str) -> str:
    return f"{interface}_{name}"


def _packed(pod: Pod) -> Addresses:
    by_version = {ip_address(one).version: Address.of(one).packed for one in pod.addresses}
    return Addresses(by_version.get(4, _NO_ADDRESS), by_version.get(6, _NO_ADDRESS))


def _attached(directory: Path, pod: Pod, name: str) -> int | None:
    """The index of the interface that the pinned link filters; None: it is gone, or another."""
    try:
        link = syscall.pinned(str(pins.link_path(directory, _link(pod.interface, name))))
    except FileNotFoundError:
        return None
    with opened(link):
        found = syscall.tcx_link(link)
        return found.interface if found.attach_type == PROGRAMS[name].attach_type else None
