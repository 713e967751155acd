"""Pod, core/v1: the few fields of it that Weft reads.

Pods are written by controllers of every version, with hundreds of fields that mean nothing to a
mesh, so unlike in other kinds what is not known in `spec` and `status` is passed over
(`LenientModel`). The status is input here: kubelet writes it, Weft reads where the pod is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from mesh.model import scalars as s
from mesh.model.core import Protocol
from mesh.model.meta import LenientModel, Model, ObjectMeta


class ContainerPort(LenientModel, frozen=True, kw_only=True):
    name: str | None = None
    container_port: s.PortNumber
    protocol: Protocol = "TCP"


class Container(LenientModel, frozen=True, kw_only=True):
    """`restart_policy`: of an init container, "Always" for one that runs beside the others."""

    name: str
    ports: tuple[ContainerPort, ...] = ()
    restart_policy: str | None = None


class PodSpec(LenientModel, frozen=True, kw_only=True):
    """`node_name` None: not scheduled yet; `service_account_name` "": it has none, and so no
    identity, as a static pod in a cluster."""

    node_name: str | None = None
    service_account_name: str = "default"
    host_network: bool = False
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()

    @property
    def ports(self) -> Iterator[ContainerPort]:
        """Of all containers that run as long as the pod does."""
        beside = (one for one in self.init_containers if one.restart_policy == "Always")
        return (port for one in (*self.containers, *beside) for port in one.ports)


class PodIP(LenientModel, frozen=True, kw_only=True):
    ip: str


class PodCondition(LenientModel, frozen=True, kw_only=True):
    type: str
    status: str


class PodStatus(LenientModel, frozen=True, kw_only=True):
    """`pod_ip` is the first of `pod_ips`, as the API server keeps them."""

    phase: str | None = None
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    pod_ips: tuple[PodIP, ...] = msgspec.field(default=(), name="podIPs")
    conditions: tuple[PodCondition, ...] = ()


class Pod(Model, frozen=True, kw_only=True):
    api_version: str = "v1"
    kind: Literal["Pod"] = "Pod"
    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()
