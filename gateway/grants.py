"""ReferenceGrants and namespaces: who may refer to what across namespaces."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.model.derive import View
from mesh.model.meta import LabelSelector, ObjectKey
from mesh.model.references import GROUP


def permitted(
    view: View, from_kind: str, from_namespace: str, to_kind: str, target: ObjectKey
) -> bool:
    """May a Gateway API object of `from_kind` refer to the core object `target`? In its own
    namespace always, elsewhere where a ReferenceGrant of the target's namespace says so."""
    if from_namespace == target.namespace:
        return True
    for key in view.bucket("grants_in", target.namespace):
        spec = view.get("ReferenceGrant", key).spec
        if any(
            f.group == GROUP and f.kind == from_kind and f.namespace == from_namespace
            for f in spec.from_
        ) and any(
            t.group == "" and t.kind == to_kind and t.name in (None, target.name) for t in spec.to
        ):
            return True
    return False


def not_permitted(from_kind: str, from_namespace: str, to_kind: str, target: ObjectKey) -> str:
    return (
        f"{to_kind} {target} is in another namespace, and no ReferenceGrant"
        f" there lets {from_kind}s of namespace {from_namespace} refer to it"
    )


def namespace_matches(
    view: View, source: str, selector: LabelSelector | None, own: str, other: str
) -> bool:
    """Is namespace `other` among those that `from: source` names, seen from namespace `own`?"""
    if source == "All":
        return True
    if source == "Same":
        return own == other
    if source == "Selector":
        return selector is not None and selector.matches(_labels(view, other))
    return False


def _labels(view: View, name: str) -> Mapping[str, str]:
    namespace = view.get("Namespace", ObjectKey("", name))
    labels = dict(namespace.metadata.labels) if namespace is not None else {}
    # Every namespace of a cluster has this label; one that is only implied has it too.
    labels.setdefault("kubernetes.io/metadata.name", name)
    return labels
