"""Weft's commands as a chained CNI plugin, for pods that a plugin before it has given a veth.

ADD filters and records the pod, and passes the result of the plugins before it on as it is; DEL
undoes that, CHECK looks whether it is still so. Works in the network namespace of the node. Knows
neither how it was asked nor what else the agent does.

Source: CNI specification 1.1.0, sections 2, 4 and 5.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bpf import podfilter
from bpf.errors import DatapathError
from mesh.cni import links

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
# Error codes of the specification, and (from 100 on) ours.
INCOMPATIBLE, BAD_ENVIRONMENT, NOT_DECODED, BAD_CONFIG, TRY_AGAIN, NOT_AVAILABLE = (
    1,
    4,
    6,
    7,
    11,
    50,
)
NO_VETH, NOT_FILTERED = 100, 101
_NOT_LOADED = (
    "the eBPF programs that enforce policy are not loaded on this node yet (weft status says why); "
    "no pod can run before they are"
)


class Place(NamedTuple):
    """The pin directory of the node's eBPF programs, and where its pods are recorded."""

    pins: Path
    records: Path


class Answer(NamedTuple):
    """Exit status and standard output."""

    status: int
    output: bytes


class CniError(Exception):
    """`code` as in the specification; what is wrong, and where it may be looked at."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


class _Attachment(msgspec.Struct, rename={"container": "containerID"}):
    container: str
    ifname: str


class _Config(msgspec.Struct, rename={"version": "cniVersion", "previous": "prevResult"}):
    version: str = "0.1.0"
    previous: msgspec.Raw = msgspec.Raw(b"null")
    valid: list[_Attachment] | None = msgspec.field(default=None, name="cni.dev/valid-attachments")


class _Interface(msgspec.Struct):
    name: str
    sandbox: str = ""


class _Ip(msgspec.Struct):
    address: str
    interface: int | None = None


class _Result(msgspec.Struct):
    interfaces: list[_Interface] = []
    ips: list[_Ip] = []


def answer(
    environment: Mapping[str, str], stdin: bytes, pod: socket.socket | None, place: Place
) -> Answer:
    """`environment`: the CNI_* variables; `pod`: a netlink socket of the pod's namespace, if it has
    one."""
    version = VERSIONS[-1]
    try:
        config = _decoded(stdin, _Config, "the network configuration")
        version = config.version
        command = environment.get("CNI_COMMAND", "")
        if command == "VERSION":
            about = {"cniVersion": version, "supportedVersions": VERSIONS}
            return Answer(0, msgspec.json.encode(about))
        if version not in VERSIONS:
            known = ", ".join(VERSIONS)
            raise CniError(INCOMPATIBLE, f"cniVersion {version} is none of {known}")
        if command not in _COMMANDS:
            raise CniError(BAD_ENVIRONMENT, f"CNI_COMMAND is {command!r}: no command of CNI")
        return Answer(0, _COMMANDS[command](environment, config, pod, place))
    except CniError as error:
        about = {"cniVersion": version, "code": error.code, "msg": str(error)}
        return Answer(1, msgspec.json.encode({**about, "details": error.details}))


def _add(
    environment: Mapping[str, str], config: _Config, pod: socket.socket | None, place: Place
) -> bytes:
    made = _pod(environment, config, pod)
    try:
        there = podfilter.add(place.pins, place.records, made)
    except DatapathError as error:
        podfilter.remove(place.pins, place.records, made.interface)
        raise CniError(NOT_FILTERED, f"{made.about}: {error}") from None
    if not there:
        raise CniError(TRY_AGAIN, f"{made.about}: {_NOT_LOADED}")
    return bytes(config.previous)


def _check(
    environment: Mapping[str, str], config: _Config, pod: socket.socket | None, place: Place
) -> bytes:
    made = _pod(environment, config, pod)
    if podfilter.loaded(place.pins) is None:
        raise CniError(TRY_AGAIN, f"{made.about}: {_NOT_LOADED}")
    try:
        amiss = podfilter.check(place.pins, made)
    except DatapathError as error:
        amiss = str(error)
    if amiss:
        raise CniError(NOT_FILTERED, f"{made.about}: {amiss}")
    return b""


def _delete(
    environment: Mapping[str, str], _config: _Config, pod: socket.socket | None, place: Place
) -> bytes:
    cookie = podfilter.netns_cookie_of(pod) if pod is not None else 0
    _remove(place, podfilter.find(place.records, _attachment(environment), cookie))
    return b""


def _collect(
    _environment: Mapping[str, str], config: _Config, _pod: socket.socket | None, place: Place
) -> bytes:
    if config.valid is None:
        raise CniError(BAD_CONFIG, "GC: there is no cni.dev/valid-attachments")
    valid = {f"{one.container}/{one.ifname}" for one in config.valid}
    for one in podfilter.attachments(place.records):
        if one not in valid:
            _remove(place, podfilter.find(place.records, one))
    return b""


def _status(
    _environment: Mapping[str, str], _config: _Config, _pod: socket.socket | None, place: Place
) -> bytes:
    if podfilter.loaded(place.pins) is None:
        raise CniError(NOT_AVAILABLE, _NOT_LOADED)
    return b""


_COMMANDS: dict[str, Callable[[Mapping[str, str], _Config, socket.socket | None, Place], bytes]] = {
    "ADD": _add,
    "CHECK": _check,
    "DEL": _delete,
    "GC": _collect,
    "STATUS": _status,
}


def _remove(place: Place, interfaces: list[str]) -> None:
    for interface in interfaces:
        try:
            podfilter.remove(place.pins, place.records, interface)
        except DatapathError as error:
            raise CniError(NOT_FILTERED, str(error)) from None


def _pod(
    environment: Mapping[str, str], config: _Config, netlink: socket.socket | None
) -> podfilter.Pod:
    attachment, ifname = _attachment(environment), environment["CNI_IFNAME"]
    if bytes(config.previous) == b"null":
        raise CniError(
            BAD_CONFIG,
            "prevResult is missing: weft-cni gives pods no network; it stands in a list of plugins "
            "behind one that does",
        )
    if netlink is None:
        where = environment.get("CNI_NETNS", "")
        raise CniError(BAD_ENVIRONMENT, f"CNI_NETNS is {where!r}: no network namespace there")
    result = _decoded(bytes(config.previous), _Result, "prevResult")
    addresses = _addresses(result, ifname)
    cookie = podfilter.netns_cookie_of(netlink)
    about = _about(environment.get("CNI_ARGS", ""))
    return podfilter.Pod(
        interface=host_end(netlink, ifname),
        addresses=addresses,
        cookie=cookie,
        attachment=attachment,
        about=about,
    )


def _attachment(environment: Mapping[str, str]) -> str:
    for name in ("CNI_CONTAINERID", "CNI_IFNAME"):
        if not environment.get(name):
            raise CniError(BAD_ENVIRONMENT, f"{name} is missing")
    return f"{environment['CNI_CONTAINERID']}/{environment['CNI_IFNAME']}"


def _about(arguments: str) -> str:
    """Of CNI_ARGS, as a kubelet's runtime has them."""
    values = dict(one.split("=", 1) for one in arguments.split(";") if "=" in one)
    names = ("K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_UID")
    return "/".join(values.get(name, "") for name in names)


def _addresses(result: _Result, ifname: str) -> tuple[str, ...]:
    """Those of the pod's interface, one of each family."""
    found: dict[int, str] = {}
    for ip in result.ips:
        at = ip.interface
        if at is not None and not (
            0 <= at < len(result.interfaces)
            and result.interfaces[at].sandbox
            and result.interfaces[at].name == ifname
        ):
            continue
        try:
            address = ip_interface(ip.address).ip
        except ValueError as error:
            raise CniError(BAD_CONFIG, f"prevResult: ips: {error}") from None
        if address.version in found:
            raise CniError(
                BAD_CONFIG,
                f"prevResult: {ifname} has two addresses of IPv{address.version}: Weft knows pods "
                "by one of each family",
            )
        found[address.version] = str(address)
    if not found:
        raise CniError(BAD_CONFIG, f"prevResult: {ifname} has no address")
    return tuple(found.values())


def host_end(netlink: socket.socket, ifname: str) -> str:
    """The name of the node's end of the pod's veth."""
    try:
        inner = links.find(netlink, ifname)
    except OSError as error:
        raise CniError(BAD_ENVIRONMENT, f"CNI_IFNAME {ifname}: {error.strerror}") from None
    not_ours = CniError(
        NO_VETH,
        f"{ifname} is {inner.kind or 'no virtual interface'} without an end on this node: Weft "
        "works with plugins that give pods a veth pair (bridge, ptp, and what is made like them)",
    )
    if inner.kind != "veth":
        raise not_ours
    try:
        name = socket.if_indextoname(inner.peer)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as here:
            outer = links.find(here, name)
    except OSError:
        raise not_ours from None
    if outer.kind != "veth" or outer.peer != inner.number:
        raise not_ours
    return name


def _decoded(data: bytes, kind: type[Any], what: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise CniError(BAD_CONFIG, f"{what}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CniError(NOT_DECODED, f"{what} is no JSON: {error}") from None
