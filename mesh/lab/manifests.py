"""The lab's nodes, Services, pods and endpoints as Kubernetes objects, for Weft's directory source.

They are as an API server would have them: a Pod from when it is scheduled until it is gone, and
EndpointSlices with all pods that a Service selects, ready or not. Each node has pods and slices of
its own, so that nobody has to write what another node knows. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from mesh.lab.config import NamespaceConfig
from mesh.lab.plan import Plan, PodPlan, ServicePlan
from mesh.lab.state import PodStatus

Object = dict[str, Any]
_FAMILIES = ("IPv4", "IPv6")


class _Dumper(yaml.CSafeDumper):
    """Quotes these letters, which Kubernetes reads as booleans and PyYAML does not."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^[yYnN]$"), list("yYnN"))


def to_yaml(objects: Iterable[Object]) -> bytes:
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False).encode()


def nodes(plan: Plan) -> Iterator[Object]:
    for node in plan.nodes:
        addresses = [{"type": "InternalIP", "address": address} for address in node.addresses]
        yield {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name},
            "spec": {"podCIDRs": list(node.pod_ranges)},
            "status": {"addresses": addresses},
        }


def services(plan: Plan) -> Iterator[Object]:
    """Namespaces and Services."""
    used = {pod.namespace for pod in plan.pods} | {one.namespace for one in plan.services}
    given = {one.name: one for one in plan.namespaces}
    for name in sorted(used | given.keys()):
        namespace = given.get(name, NamespaceConfig(name=name))
        metadata = {
            "name": name,
            "labels": {**namespace.labels, "kubernetes.io/metadata.name": name},
            "annotations": namespace.annotations,
        }
        yield {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
    for service in plan.services:
        yield {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service.name, "namespace": service.namespace},
            "spec": {
                "selector": service.selector,
                "clusterIP": service.cluster_ips[0] if service.cluster_ips else "None",
                "clusterIPs": list(service.cluster_ips) or ["None"],
                "ipFamilies": list(_FAMILIES),
                "ipFamilyPolicy": "RequireDualStack",
                "sessionAffinity": service.session_affinity,
                "ports": [
                    {
                        "name": port.name,
                        "port": port.port,
                        "targetPort": port.target_port or port.port,
                        "protocol": port.protocol,
                        **({"appProtocol": port.app_protocol} if port.app_protocol else {}),
                    }
                    for port in service.ports
                ],
            },
        }


def pods(plan: Plan, node: str, statuses: Mapping[str, PodStatus]) -> Iterator[Object]:
    """The node's Pods, with what Weft and its policies can ask of them; statuses by the pods' keys.
    A stopped pod is none any more."""
    for pod in plan.pods_of(node):
        status = statuses[pod.key]
        if status.phase == "Stopped":
            continue
        metadata = {
            "name": pod.name,
            "namespace": pod.namespace,
            "uid": f"{pod.container_id}.{status.start}",
            "labels": pod.labels,
            "annotations": pod.annotations,
        }
        if pod.uid:
            metadata["uid"] = pod.uid
        if status.deletion_timestamp is not None:
            metadata["deletionTimestamp"] = status.deletion_timestamp
        ports = [
            {"name": port.name, "containerPort": port.port, "protocol": port.protocol}
            for port in pod.ports
        ]
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": {
                "nodeName": pod.node,
                "serviceAccountName": pod.service_account,
                "containers": [{"name": "main", "ports": ports}],
            },
            "status": {
                "phase": _phase(status),
                "conditions": [{"type": "Ready", "status": str(status.ready)}],
                # They are the plan's, so they are known before there is a network.
                "podIP": pod.addresses[0],
                "podIPs": [{"ip": address} for address in pod.addresses],
            },
        }


def _phase(status: PodStatus) -> str:
    """Pod.status.phase, which has no word for a pod that is terminating."""
    if status.phase == "Exited":
        return "Failed" if status.exit_code else "Succeeded"
    return "Running" if status.phase == "Terminating" else status.phase


def endpoint_slices(plan: Plan, node: str, statuses: Mapping[str, PodStatus]) -> Iterator[Object]:
    """The slices of the node's pods; statuses by the pods' keys. A stopped pod is none any more."""
    for service in plan.services:
        # Pods whose ports of the same name have different numbers cannot share a slice.
        by_ports: dict[tuple[int | None, ...], list[PodPlan]] = {}
        for pod in plan.pods_of(node):
            if service.selects(pod) and statuses[pod.key].phase != "Stopped":
                by_ports.setdefault(_target_ports(service, pod), []).append(pod)
        for number, (ports, pods) in enumerate(by_ports.items()):
            for family, address_type in enumerate(_FAMILIES):
                suffix = f"-{number}" if number else ""
                yield {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{service.name}-{node}-{address_type.lower()}{suffix}",
                        "namespace": service.namespace,
                        "labels": {"kubernetes.io/service-name": service.name},
                    },
                    "addressType": address_type,
                    "endpoints": [_endpoint(pod, family, statuses[pod.key]) for pod in pods],
                    "ports": [
                        {
                            "name": port.name,
                            "port": number,
                            "protocol": port.protocol,
                            **({"appProtocol": port.app_protocol} if port.app_protocol else {}),
                        }
                        for port, number in zip(service.ports, ports, strict=True)
                        if number is not None
                    ],
                }


def _target_ports(service: ServicePlan, pod: PodPlan) -> tuple[int | None, ...]:
    """The pod's port for each of the Service's; None: it has no port of that name."""
    named = {port.name: port.port for port in pod.ports}
    return tuple(
        named.get(port.target_port)
        if isinstance(port.target_port, str)
        else port.target_port or port.port
        for port in service.ports
    )


def _endpoint(pod: PodPlan, family: int, status: PodStatus) -> Object:
    terminating = status.phase == "Terminating"
    return {
        "addresses": [pod.addresses[family]],
        "conditions": {
            "ready": status.ready,
            "serving": status.ready or terminating,
            "terminating": terminating,
        },
        "nodeName": pod.node,
        "targetRef": {"kind": "Pod", "name": pod.name, "namespace": pod.namespace},
    }
