"""Objects of an API server as Weft's: what is kept of them, and what is wrong with them.

The server has checked built-in kinds already, by rules that differ between its versions, so they
are read leniently: unknown fields are passed over. Of Gateway API kinds an unknown field is of a
newer version of the API than Weft knows; passing it over might let through more than was meant, so
the object is refused, as from every source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.model.core import ConfigMap, Secret
from mesh.model.decode import InvalidObject, Object, decode, parse
from mesh.model.errors import FieldError
from mesh.model.pod import Pod
from mesh.policy.unreadable import CLOSES, CLOSES_NOTHING, POLICIES
from mesh.sources.documents import Problem

# Where problems and objects of a cluster are said to be, as files are of a directory.
PLACE = "cluster"
# The status of these is what kubelet or others say, and Weft reads; of all others it is what
# controllers say, Weft itself among them.
STATUS_IS_INPUT = frozenset(("Node", "Pod"))
# What TLS is made of. Other values, up to a megabyte each, are not kept.
_TLS_KEYS = frozenset(("ca.crt", "tls.crt", "tls.key"))
_OURS = "weft.dev/"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def read(raw: Mapping[str, Any], *, custom: bool) -> Object:
    """`custom`: of a kind that a CustomResourceDefinition defines. InvalidObject: it cannot be
    used, and why."""
    try:
        slim = _slim(raw)
        return decode(slim) if custom else parse(slim, lenient=True)
    except InvalidObject:
        raise
    except Exception as error:
        why = FieldError("", "readable", f"a defect in Weft: reading it failed: {error!r}")
        raise InvalidObject((why,)) from error


def _slim(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Without what Weft does not read and what changes without meaning."""
    kind = raw.get("kind")
    slim = {k: v for k, v in raw.items() if k != "status" or kind in STATUS_IS_INPUT}
    metadata = {k: v for k, v in raw["metadata"].items() if k != "managedFields"}
    if _LAST_APPLIED in (metadata.get("annotations") or ()):
        metadata["annotations"] = {
            k: v for k, v in metadata["annotations"].items() if k != _LAST_APPLIED
        }
    if kind == Pod.__name__:
        # Of a pod's many annotations only these are asked for; the others may be large, and change.
        annotations = metadata.get("annotations") or {}
        metadata["annotations"] = {k: v for k, v in annotations.items() if k.startswith(_OURS)}
        # All pods have one but mirrors of static pods, which their nodes make where they like.
        slim["spec"] = {"serviceAccountName": ""} | (raw.get("spec") or {})
    slim["metadata"] = metadata
    if kind in (ConfigMap.__name__, Secret.__name__):
        slim["data"] = {k: v for k, v in (raw.get("data") or {}).items() if k in _TLS_KEYS}
        slim.pop("binaryData", None)
    return slim


def problems(
    raw: Mapping[str, Any], error: InvalidObject, *, kept: bool, closed: bool = False
) -> list[Problem]:
    """What to tell of an object that cannot be used; `kept`: an earlier version is in force;
    `closed`: it is a policy, of which it is left that it denies."""
    metadata = raw["metadata"]
    more = "; its last good version stays in force" if kept else ""
    if not kept and raw.get("kind") in POLICIES:
        more = CLOSES if closed else CLOSES_NOTHING
    return [
        Problem(
            PLACE,
            kind=raw.get("kind", ""),
            namespace=metadata.get("namespace", ""),
            name=metadata["name"],
            path=wrong.path,
            rule=wrong.rule,
            message=wrong.message + more,
        )
        for wrong in error.errors
    ]
