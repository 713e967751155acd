"""What the agent is told on its command line, and the settings file.

`weft up` shows these to users; this module checks what they gave.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import socket
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from certs.spiffe import BadSpiffeId, check_trust_domain
from gateway.control import Options
from l7proxy import forwarding
from l7proxy.field_rules import Refused
from mesh.agent.flows import DEFAULT_CAPACITY
from mesh.agent.ports import is_here, reached_at
from mesh.agent.rundir import RunDir, default_run_dir
from mesh.model.nodeconfig import Settings
from mesh.sources.manifest import UnreadableError, read_documents

# Instead of a socket: the authority is the cluster's, asked by CertificateSigningRequests.
CLUSTER = "cluster"
DEFAULT_NAMESPACE = "weft-system"
DEFAULT_ADMIN = "127.0.0.1:15090"
NETNS_DIR = Path("/run/netns")
DEFAULT_MESH_ADDRESSES = ("127.0.0.1", "::1")
# The least that makes sense, where it is not a millisecond or 1.
_LEAST = {"max_head_bytes": 256, "max_body_bytes": 0, "drain_timeout_s": 0, "trusted_hops": 0}


class OptionError(Exception):
    """An option cannot be used; which, why, what to do."""


class CniDirectories(NamedTuple):
    """Of a node: executables, the runtime's lists of plugins, and pods' network namespaces."""

    bin: Path
    conf: Path
    netns: Path


class Steering(NamedTuple):
    """The eBPF data path: the workloads' cgroup, that of Weft's own processes, where it is pinned,
    and where this node's pods are recorded. `mode`: "auto" sends to workloads by redirect if the
    self-test says so, "kernel" insists on it, "proxy" never does. `http`, likewise: whether
    requests may pass by the proxy; "on" insists. `mtls`: the node has an authority. `cni`: where
    its plugin is to be installed."""

    cgroup: Path
    proxy_cgroup: Path
    pins: Path
    pods: Path
    mode: Literal["auto", "kernel", "proxy"]
    http: Literal["auto", "on", "off"] = "off"
    mtls: bool = False
    cni: CniDirectories | None = None

    @property
    def pairs(self) -> bool:
        """Requests are to pass by the proxy where this kernel does it right."""
        return self.http != "off" and self.mode != "proxy"

    @property
    def nested(self) -> bool:
        """Weft's own processes are in the workloads' cgroup, as a pod's are in that of all pods: by
        their network namespace, the node's, they are known to be none."""
        return self.proxy_cgroup.is_relative_to(self.cgroup)


class AgentOptions(NamedTuple):
    """`manifests` None: objects come from the API server that `kubeconfig` (None: the environment,
    or the pod's service account) leads to, and `namespace` is Weft's own there; Secrets are
    the copies in `secrets_namespace`, unless that is "". `admin` None: no
    admin port; `steer` None: no eBPF; `flow_buffer`: flow records held; `authority`: its socket for
    this node, or CLUSTER; None: there is none."""

    manifests: Path | None
    kubeconfig: Path | None
    namespace: str
    secrets_namespace: str
    run_dir: Path
    control_fd: int
    workers: int
    plane: Options
    admin: tuple[str, int] | None
    steer: Steering | None
    flow_buffer: int
    authority: Path | None


def parse(arguments: list[str]) -> AgentOptions:
    """The agent's command line. OptionError: a value cannot be used."""
    parser = argparse.ArgumentParser(prog="mesh.agent.agent", allow_abbrev=False)
    parser.add_argument("--source", choices=("directory", "kubernetes"))
    parser.add_argument("--manifests", type=Path)
    parser.add_argument("--kubeconfig", type=Path)
    parser.add_argument("--namespace", default=DEFAULT_NAMESPACE)
    parser.add_argument("--secrets-namespace", default="")
    parser.add_argument("--run-dir", type=Path, default=default_run_dir())
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--address-pool", action="append", default=[])
    parser.add_argument("--bind-address", default="0.0.0.0")
    parser.add_argument("--advertise", action="append", default=[])
    parser.add_argument("--admin", default=DEFAULT_ADMIN)
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--access-log", choices=("json", "text", "off"))
    parser.add_argument("--steer", type=Path)
    parser.add_argument("--node")
    parser.add_argument("--mesh-address", action="append", default=[])
    parser.add_argument("--proxy-cgroup", type=Path)
    parser.add_argument("--pins", type=Path)
    parser.add_argument("--cni-bin-dir", type=Path)
    parser.add_argument("--cni-conf-dir", type=Path)
    parser.add_argument("--netns-dir", type=Path, default=NETNS_DIR)
    parser.add_argument("--datapath", choices=("auto", "kernel", "proxy"), default="auto")
    parser.add_argument("--http-in-kernel", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--flow-buffer", type=int, default=DEFAULT_CAPACITY)
    parser.add_argument("--authority", type=Path)
    parser.add_argument("--policy-audit", choices=("on", "off"), default="off")
    parser.add_argument("--trust-domain", default="cluster.local")
    args = parser.parse_args(arguments)
    return AgentOptions(
        manifests=manifests(args),
        kubeconfig=args.kubeconfig,
        namespace=args.namespace,
        secrets_namespace=args.secrets_namespace,
        run_dir=args.run_dir,
        control_fd=args.control_fd,
        workers=args.workers,
        plane=plane_options(args),
        admin=parse_admin(args.admin),
        steer=steering(args),
        flow_buffer=args.flow_buffer,
        authority=args.authority,
    )


def manifests(args: argparse.Namespace) -> Path | None:
    """The directory that objects come from; None: they come from a cluster. OptionError: it is not
    said which, or both are."""
    cluster = args.source == "kubernetes" or (args.source is None and args.kubeconfig is not None)
    if cluster and args.manifests is None:
        return None
    if cluster or args.kubeconfig is not None:
        raise OptionError("--manifests is for a directory, --kubeconfig for a cluster: give one")
    if args.manifests is None:
        raise OptionError(
            "nothing says where objects come from: give --manifests DIR, --kubeconfig FILE, or "
            "--source kubernetes for the cluster that this pod is in"
        )
    return Path(args.manifests.absolute())


def steering(args: argparse.Namespace) -> Steering | None:
    cni = _cni(args)
    if args.steer is None:
        return None
    run_dir = RunDir(args.run_dir)
    pins = args.pins or run_dir.pins
    http = _http_in_kernel(args)
    mtls = args.authority is not None
    return Steering(
        args.steer, args.proxy_cgroup, pins, run_dir.pods, args.datapath, http, mtls, cni
    )


def _cni(args: argparse.Namespace) -> CniDirectories | None:
    given = (args.cni_bin_dir, args.cni_conf_dir)
    if given == (None, None):
        return None
    if None in given or args.steer is None:
        raise OptionError("--cni-bin-dir and --cni-conf-dir go together, and with --steer")
    return CniDirectories(*given, args.netns_dir)


def _http_in_kernel(args: argparse.Namespace) -> Literal["auto", "on", "off"]:
    """OptionError: it is insisted on, and there is nothing that requests could pass by."""
    wanted: Literal["auto", "on", "off"] = getattr(args, "http_in_kernel", "auto")
    if wanted == "on" and (not _steered(args) or args.datapath == "proxy"):
        raise OptionError("--http-in-kernel=on goes with --steer, and not with --datapath=proxy")
    return wanted


def parse_admin(text: str) -> tuple[str, int] | None:
    """ADDRESS:PORT ("[::1]:15090" for IPv6), or "off"."""
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
        number = int(port)
        if not 0 <= number <= 65535:
            raise ValueError
    except ValueError:
        raise OptionError(
            f"--admin {text}: not ADDRESS:PORT; give {DEFAULT_ADMIN}, say, or off"
        ) from None
    return address, number


def plane_options(args: argparse.Namespace) -> Options:
    """The control plane's part of the command line; where it does not say what to advertise, the
    addresses that this host has now."""
    bind_address = check_address("--bind-address", args.bind_address)
    advertise = tuple(check_address("--advertise", text) for text in args.advertise)
    return Options(
        addresses=tuple(check_pool(pool) for pool in args.address_pool),
        bind_address=bind_address,
        advertise=advertise or reached_at(bind_address),
        # Until the self-test says no.
        settings=msgspec.structs.replace(
            read_settings(args.settings, access_log=args.access_log),
            http_in_kernel=_http_in_kernel(args) != "off"
            and _steered(args)
            and args.datapath != "proxy",
        ),
        node=args.node or (socket.gethostname().lower() if _steered(args) else ""),
        mesh_addresses=mesh_addresses(args),
        authority=getattr(args, "authority", None) is not None,
        trust_domain=_trust_domain(getattr(args, "trust_domain", "cluster.local")),
        policy_audit=getattr(args, "policy_audit", "off") == "on",
    )


def _trust_domain(name: str) -> str:
    try:
        return check_trust_domain(name)
    except BadSpiffeId as error:
        raise OptionError(f"--trust-domain: {error}") from None


def mesh_addresses(args: argparse.Namespace) -> tuple[str, ...]:
    """Where workloads are sent to: with --steer, loopback if no address is given, as far as the
    host has it; without, nowhere. Commands without that option ask what would be if there were."""
    given = tuple(
        check_address("--mesh-address", one)
        for text in args.mesh_address
        for one in text.split(",")
    )
    if given and hasattr(args, "steer") and not _steered(args):
        raise OptionError("--mesh-address goes with --steer, whose workloads are sent there")
    if _steered(args):
        return given or tuple(filter(is_here, DEFAULT_MESH_ADDRESSES))
    return given


def _steered(args: argparse.Namespace) -> bool:
    return getattr(args, "steer", None) is not None


def check_address(option: str, text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise OptionError(f"{option} {text}: {error}") from None


def check_pool(text: str) -> str:
    """A CIDR, or a single address."""
    try:
        return str(ipaddress.ip_network(text, strict=True))
    except ValueError as error:
        raise OptionError(f"--address-pool {text}: {error}; give 192.0.2.0/28, say") from None


def read_settings(path: Path | None, *, access_log: str | None = None) -> Settings:
    """The proxy's limits and habits: the defaults, what a YAML or JSON file says (names as in
    mesh.model.nodeconfig.Settings), and the access log of the command line."""
    values: dict[str, object] = {}
    if path is not None:
        where = f"--settings {path}"
        try:
            documents = read_documents(path.read_bytes(), is_json=path.suffix == ".json")
        except OSError as error:
            raise OptionError(f"{where}: {error.strerror}") from None
        except UnreadableError as error:
            raise OptionError(f"{where}: {error}") from None
        if len(documents) > 1 or any(d.errors or not isinstance(d.value, dict) for d in documents):
            raise OptionError(f"{where}: must be one mapping of names to values, each given once")
        for document in documents:
            values = document.value
        # What has an option of its own is none.
        known = {field.name for field in msgspec.structs.fields(Settings)} - {"http_in_kernel"}
        if unknown := sorted(values.keys() - known):
            raise OptionError(
                f"{where}: there is no setting {', '.join(unknown)}; the settings are "
                f"{', '.join(sorted(known))}"
            )
    if access_log is not None:
        values = {**values, "access_log": access_log}
    try:
        settings = msgspec.convert(values, Settings)
        forwarding.check(settings)
    except (msgspec.ValidationError, Refused) as error:
        raise OptionError(f"--settings {path}: {error}") from None
    for name in sorted(values.keys() - {"merge_slashes"}):
        value, least = getattr(settings, name), _LEAST.get(name, 1e-3)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise OptionError(f"--settings {path}: {name} is {value}; it must be {least:g} or more")
    return settings
