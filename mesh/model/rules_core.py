"""What the API server asks of metadata and of Kubernetes' own kinds, beyond their schemas.

Source: Kubernetes' validation of core/v1 and discovery.k8s.io/v1. One thing is left out on purpose:
an EndpointSlice may hold loopback addresses, which a host without a cluster needs.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence

from mesh.model.core import (
    ConfigMap,
    Endpoint,
    EndpointSlice,
    Secret,
    Service,
    ServicePort,
    ServiceSpec,
)
from mesh.model.errors import FieldError
from mesh.model.meta import ObjectMeta
from mesh.model.node import NodeAddress
from mesh.model.pod import PodIP, PodStatus
from mesh.model.rules import Check, Finding, duplicates
from mesh.model.scalars import DNS_LABEL, DNS_SUBDOMAIN, LABEL_KEY, LABEL_VALUE
from mesh.model.schema import found

MAX_ANNOTATIONS = 256 * 1024
MAX_DATA = 1024 * 1024

# --- metadata ------------------------------------------------------------------------------------


class NameForm:
    """A form of object names: its name in RFCs, pattern, greatest length."""

    def __init__(self, rule: str, pattern: str, length: int) -> None:
        self.rule = rule
        self._pattern = re.compile(pattern)
        self._length = length

    def accepts(self, name: str) -> bool:
        return len(name) <= self._length and self._pattern.search(name) is not None


SUBDOMAIN = NameForm("must be a DNS-1123 subdomain", DNS_SUBDOMAIN, 253)
LABEL = NameForm("must be a DNS-1123 label", DNS_LABEL, 63)
LABEL_1035 = NameForm("must be a DNS-1035 label", r"^[a-z]([-a-z0-9]*[a-z0-9])?\Z", 63)
_FORM_ADVICE = (
    "use lower case letters, digits and '-' (a subdomain also '.'), beginning and ending with a"
    " letter or digit (a DNS-1035 label begins with a letter)"
)

_KEY = re.compile(LABEL_KEY)
_VALUE = re.compile(LABEL_VALUE)


def metadata_errors(metadata: ObjectMeta, form: NameForm, namespaced: bool) -> list[FieldError]:
    """What is wrong with an object's names, labels and annotations. Annotations are not quoted:
    kubectl keeps whole manifests in one."""
    errors = []

    def refuse(path: str, rule: str, message: str) -> None:
        errors.append(FieldError(f"metadata.{path}", rule, message))

    if not metadata.name:
        refuse("name", "required", "is missing; add it")
    elif not form.accepts(metadata.name):
        refuse("name", form.rule, f"found {found(metadata.name)}; {_FORM_ADVICE}")
    if namespaced and not LABEL.accepts(metadata.namespace):
        refuse("namespace", LABEL.rule, f"found {found(metadata.namespace)}; {_FORM_ADVICE}")
    if not namespaced and metadata.namespace:
        refuse("namespace", "must be absent", "the kind is cluster-scoped; remove the namespace")
    for key, value in metadata.labels.items():
        if not _is_key(key):
            refuse(f"labels[{key}]", "must be a qualified name", "write it as in example.com/name")
        if len(value) > 63 or not _VALUE.search(value):
            refuse(
                f"labels[{key}]",
                "must be at most 63 letters, digits, '-', '_' and '.', a letter or digit at both"
                " ends",
                f"found {found(value)}",
            )
    for key in metadata.annotations:
        if not _is_key(key.lower()):
            refuse(f"annotations[{key}]", "must be a qualified name", "write example.com/name")
    if sum(len(k) + len(v) for k, v in metadata.annotations.items()) > MAX_ANNOTATIONS:
        refuse("annotations", f"must be at most {MAX_ANNOTATIONS} bytes in all", "remove some")
    return errors


def _is_key(key: str) -> bool:
    return len(key.rpartition("/")[0]) <= 253 and _KEY.search(key) is not None


# --- Service -------------------------------------------------------------------------------------

_PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z")


def _has_ports(spec: ServiceSpec) -> Finding:
    if not spec.ports and spec.type != "ExternalName" and spec.cluster_ip != "None":
        return "has none; add a port, or make the Service headless (clusterIP: None)"
    return None


def _external_name(spec: ServiceSpec) -> Finding:
    if spec.type != "ExternalName":
        return None
    if spec.external_name is None:
        return "externalName is missing; add it"
    name = spec.external_name.removesuffix(".")
    return None if SUBDOMAIN.accepts(name) else f"externalName is {found(spec.external_name)}"


def _cluster_ip(address: str) -> Finding:
    if address in ("", "None") or _ip_version(address) is not None:
        return None
    return f"found {found(address)}; write an address or None, or leave it out"


def _cluster_ips(addresses: Sequence[str]) -> Finding:
    return next(filter(None, map(_cluster_ip, addresses)), None)


def _ports_named(ports: Sequence[ServicePort]) -> Finding:
    unnamed = [f"[{index}]" for index, port in enumerate(ports) if not port.name]
    if len(ports) > 1 and unnamed:
        return f"{', '.join(unnamed)} has no name; add one"
    return None


def _port_names(ports: Sequence[ServicePort]) -> Finding:
    wrong = [found(port.name) for port in ports if port.name and not LABEL.accepts(port.name)]
    return f"found {', '.join(wrong)}; {_FORM_ADVICE}" if wrong else None


def _port_names_unique(ports: Sequence[ServicePort]) -> Finding:
    for first, later in duplicates([port.name for port in ports]):
        return f"[{first}] and [{later}] are both named {found(ports[later].name)}; rename one"
    return None


def _ports_unique(ports: Sequence[ServicePort]) -> Finding:
    for first, later in duplicates([(port.protocol, port.port) for port in ports]):
        return f"[{first}] and [{later}] are the same; remove one"
    return None


def _target_port(port: ServicePort) -> Finding:
    target = port.target_port
    if isinstance(target, int):
        return None if 1 <= target <= 65535 else f"targetPort is {target}"
    if target is not None and not _PORT_NAME.match(target):
        return f"targetPort is {found(target)}"
    return None


# --- EndpointSlice -------------------------------------------------------------------------------


def _ip_version(text: str) -> int | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if "%" in text else address.version


def _addresses_of_type(slice: EndpointSlice) -> Finding:
    accepts: Callable[[str], bool] = {
        "IPv4": lambda text: _ip_version(text) == 4,
        "IPv6": lambda text: _ip_version(text) == 6,
        "FQDN": lambda text: SUBDOMAIN.accepts(text.removesuffix(".")),
    }[slice.address_type]
    for index, endpoint in enumerate(slice.endpoints):
        for address in endpoint.addresses:
            if not accepts(address):
                return f"endpoints[{index}] has {found(address)}, not an {slice.address_type}"
    return None


def _few_addresses(endpoint: Endpoint) -> Finding:
    count = len(endpoint.addresses)
    return None if 1 <= count <= 100 else f"has {count}"


def _few_endpoints(slice: EndpointSlice) -> Finding:
    if len(slice.endpoints) > 1000 or len(slice.ports) > 20_000:
        return f"has {len(slice.endpoints)} endpoints, {len(slice.ports)} ports; use more slices"
    return None


def _slice_ports_unique(slice: EndpointSlice) -> Finding:
    for first, later in duplicates([port.name for port in slice.ports]):
        return f"ports[{first}] and ports[{later}] are both named {found(slice.ports[later].name)}"
    return None


# --- Pod -----------------------------------------------------------------------------------------


def _pod_ip(address: str) -> Finding:
    if not address or _ip_version(address) is not None:
        return None
    return f"found {found(address)}; write an address, or leave it out"


def _pod_ips(status: PodStatus) -> Finding:
    if not status.pod_ip or not status.pod_ips or status.pod_ips[0].ip == status.pod_ip:
        return None
    return f"podIP is {status.pod_ip}, podIPs begins with {found(status.pod_ips[0].ip)}"


# --- Node ----------------------------------------------------------------------------------------


def _node_address(address: NodeAddress) -> Finding:
    if address.type != "InternalIP" or _ip_version(address.address) is not None:
        return None
    return f"found {found(address.address)}"


# --- Secret and ConfigMap ------------------------------------------------------------------------

_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}\Z")
_TLS_KEYS = frozenset({"tls.crt", "tls.key"})


def _data_keys(data: Mapping[str, object]) -> Finding:
    wrong = [
        found(key) for key in data if not _DATA_KEY.match(key) or key == "." or key.startswith("..")
    ]
    return f"found {', '.join(wrong)}" if wrong else None


def _secret_size(secret: Secret) -> Finding:
    size = sum(map(len, secret.data.values()))
    return f"has {size} bytes" if size > MAX_DATA else None


def _map_size(config: ConfigMap) -> Finding:
    size = sum(len(text.encode(errors="surrogatepass")) for text in config.data.values())
    size += sum(map(len, config.binary_data.values()))
    return f"has {size} bytes" if size > MAX_DATA else None


def _map_keys_apart(config: ConfigMap) -> Finding:
    both = sorted(config.data.keys() & config.binary_data.keys())
    return f"{', '.join(map(found, both))} stands in both; remove one" if both else None


def _tls_secret(secret: Secret) -> Finding:
    missing = sorted(_TLS_KEYS - secret.data.keys())
    if secret.type == "kubernetes.io/tls" and missing:
        return f"{', '.join(missing)} is missing; add it"
    return None


_DATA_KEY_RULE = (
    "keys must be at most 253 letters, digits, '-', '_' and '.', not beginning with '..'"
)
_SIZE_RULE = f"must be at most {MAX_DATA} bytes in all"

CHECKS: tuple[Check, ...] = (
    Check(Service, "spec", "ports are required", _has_ports),
    Check(
        ServiceSpec,
        None,
        "externalName must be a DNS name when type is ExternalName",
        _external_name,
    ),
    Check(ServiceSpec, "cluster_ip", "must be an IP address or None", _cluster_ip),
    Check(ServiceSpec, "cluster_ips", "must be IP addresses or None", _cluster_ips),
    Check(ServiceSpec, "ports", "ports must be named when there are several", _ports_named),
    Check(ServiceSpec, "ports", "port names must be DNS-1123 labels", _port_names),
    Check(ServiceSpec, "ports", "port names must be unique", _port_names_unique),
    Check(ServiceSpec, "ports", "protocol and port together must be unique", _ports_unique),
    Check(
        ServicePort,
        None,
        "targetPort must be 1 to 65535 or a port's name (IANA service name)",
        _target_port,
    ),
    Check(EndpointSlice, None, "addresses must be of the addressType", _addresses_of_type),
    Check(
        EndpointSlice, None, "at most 1000 endpoints and 20000 ports are allowed", _few_endpoints
    ),
    Check(EndpointSlice, None, "port names must be unique", _slice_ports_unique),
    Check(Endpoint, None, "1 to 100 addresses are required", _few_addresses),
    Check(PodStatus, "pod_ip", "must be an IP address", _pod_ip),
    Check(PodStatus, None, "podIPs must begin with podIP", _pod_ips),
    Check(PodIP, "ip", "must be an IP address", _pod_ip),
    Check(NodeAddress, None, "InternalIP must be an IP address", _node_address),
    Check(Secret, "data", _DATA_KEY_RULE, _data_keys),
    Check(Secret, None, _SIZE_RULE, _secret_size),
    Check(Secret, None, "type kubernetes.io/tls needs tls.crt and tls.key", _tls_secret),
    Check(ConfigMap, "data", _DATA_KEY_RULE, _data_keys),
    Check(ConfigMap, "binary_data", _DATA_KEY_RULE, _data_keys),
    Check(ConfigMap, None, _SIZE_RULE, _map_size),
    Check(ConfigMap, None, "a key may stand in data or in binaryData", _map_keys_apart),
)
