"""The kinds that the server knows: built-in ones, and those that CustomResourceDefinitions add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GATEWAY_FIELDS = ("metadata.name", "metadata.namespace")


@dataclass(frozen=True, kw_only=True)
class Resource:
    """`generation`: rises when the spec changes (api-conventions, "Metadata"). `schemas`: by
    version, of custom resources. `unconditional`: a PUT without resourceVersion is let through."""

    group: str = ""
    kind: str
    plural: str
    namespaced: bool = True
    versions: tuple[str, ...] = ("v1",)
    subresources: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    generation: bool = False
    unconditional: bool = True
    schemas: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    create_only: bool = False

    @property
    def id(self) -> str:
        return f"{self.group}/{self.plural}"

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def custom(self) -> bool:
        return bool(self.schemas)

    def api_version(self, version: str) -> str:
        return f"{self.group}/{version}" if self.group else version


def _core(kind: str, plural: str, **more: Any) -> Resource:
    return Resource(kind=kind, plural=plural, **more)


_RBAC = "rbac.authorization.k8s.io"
BUILT_IN = (
    _core("Namespace", "namespaces", namespaced=False, subresources=("status",), short=("ns",)),
    _core("Node", "nodes", namespaced=False, subresources=("status",), short=("no",)),
    _core("Pod", "pods", subresources=("status", "binding"), short=("po",)),
    _core("Service", "services", subresources=("status",), short=("svc",)),
    _core("ServiceAccount", "serviceaccounts", short=("sa",)),
    _core("Secret", "secrets"),
    _core("ConfigMap", "configmaps", short=("cm",)),
    _core("Event", "events", short=("ev",)),
    _core("ResourceQuota", "resourcequotas", subresources=("status",), short=("quota",)),
    Resource(group="discovery.k8s.io", kind="EndpointSlice", plural="endpointslices"),
    # network-policies: it has no status.
    Resource(
        group="networking.k8s.io",
        kind="NetworkPolicy",
        plural="networkpolicies",
        short=("netpol",),
        generation=True,
    ),
    Resource(
        group="policy",
        kind="PodDisruptionBudget",
        plural="poddisruptionbudgets",
        subresources=("status",),
        short=("pdb",),
        generation=True,
    ),
    Resource(group="coordination.k8s.io", kind="Lease", plural="leases", unconditional=False),
    Resource(
        group="apps",
        kind="Deployment",
        plural="deployments",
        subresources=("status",),
        short=("deploy",),
        generation=True,
    ),
    Resource(
        group="apps",
        kind="DaemonSet",
        plural="daemonsets",
        subresources=("status",),
        short=("ds",),
        generation=True,
    ),
    Resource(
        group="certificates.k8s.io",
        kind="CertificateSigningRequest",
        plural="certificatesigningrequests",
        namespaced=False,
        subresources=("status", "approval"),
        short=("csr",),
    ),
    Resource(
        group="certificates.k8s.io",
        kind="ClusterTrustBundle",
        plural="clustertrustbundles",
        namespaced=False,
        versions=("v1beta1",),
    ),
    Resource(group=_RBAC, kind="ClusterRole", plural="clusterroles", namespaced=False),
    Resource(
        group=_RBAC, kind="ClusterRoleBinding", plural="clusterrolebindings", namespaced=False
    ),
    Resource(group=_RBAC, kind="Role", plural="roles"),
    Resource(group=_RBAC, kind="RoleBinding", plural="rolebindings"),
    Resource(
        group="apiextensions.k8s.io",
        kind="CustomResourceDefinition",
        plural="customresourcedefinitions",
        namespaced=False,
        subresources=("status",),
        short=("crd", "crds"),
        generation=True,
        unconditional=False,
    ),
    Resource(
        group="authorization.k8s.io",
        kind="SelfSubjectAccessReview",
        plural="selfsubjectaccessreviews",
        namespaced=False,
        create_only=True,
    ),
    Resource(
        group="authorization.k8s.io",
        kind="SubjectAccessReview",
        plural="subjectaccessreviews",
        namespaced=False,
        create_only=True,
    ),
)


# Not served: what authorization is asked about.
SIGNERS = Resource(group="certificates.k8s.io", kind="", plural="signers", namespaced=False)


def of_crd(crd: dict[str, Any]) -> Resource:
    """What a CustomResourceDefinition defines (crds)."""
    spec = crd["spec"]
    names = spec["names"]
    served = [version for version in spec["versions"] if version["served"]]
    return Resource(
        group=spec["group"],
        kind=names["kind"],
        plural=names["plural"],
        namespaced=spec["scope"] == "Namespaced",
        versions=tuple(version["name"] for version in served),
        subresources=("status",)
        if any("status" in (version.get("subresources") or {}) for version in served)
        else (),
        short=tuple(names.get("shortNames") or ()),
        generation=True,
        # crds: "metadata.resourceVersion: must be specified for an update"
        unconditional=False,
        schemas={version["name"]: version["schema"]["openAPIV3Schema"] for version in served},
    )


class Registry:
    """Resources by group and plural, and by the version they are asked for in."""

    def __init__(self) -> None:
        self._resources: dict[tuple[str, str], Resource] = {}
        for resource in BUILT_IN:
            self.add(resource)

    def add(self, resource: Resource) -> None:
        self._resources[resource.group, resource.plural] = resource

    def remove(self, group: str, plural: str) -> None:
        self._resources.pop((group, plural), None)

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        resource = self._resources.get((group, plural))
        return resource if resource is not None and version in resource.versions else None

    def by_id(self, ident: str) -> Resource | None:
        group, _, plural = ident.partition("/")
        return self._resources.get((group, plural))

    def all(self) -> list[Resource]:
        return list(self._resources.values())

    def groups(self) -> dict[str, dict[str, list[Resource]]]:
        """By group and version, the first version of a group preferred."""
        result: dict[str, dict[str, list[Resource]]] = {}
        for resource in self._resources.values():
            for version in resource.versions:
                result.setdefault(resource.group, {}).setdefault(version, []).append(resource)
        return result
