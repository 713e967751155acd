"""Copies of Secrets for the nodes: how controller and agents know which copy is of which Secret.

RBAC cannot restrict an agent to the Secrets that listeners refer to, whose names change; it can
restrict it to a namespace in which there are no others. So the controller copies them there, and
agents read there (--secrets-namespace on both).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from mesh.model.meta import ObjectKey

# NAMESPACE/NAME of the Secret, and "UID/resourceVersion" of what was copied.
COPY_OF = "weft.dev/copy-of"
COPY_VERSION = "weft.dev/copy-version"
_MAX_NAME = 253


def copy_name(secret: ObjectKey) -> str:
    """A namespace's name has no dots, so no two Secrets have the same."""
    name = f"{secret.namespace}.{secret.name}"
    if len(name) <= _MAX_NAME:
        return name
    return f"{secret.namespace}.{hashlib.sha256(secret.name.encode()).hexdigest()}"


def copied(annotations: Mapping[str, str] | None) -> ObjectKey | None:
    """The Secret that one with these annotations is a copy of; None: of none."""
    namespace, _, name = (annotations or {}).get(COPY_OF, "").partition("/")
    return ObjectKey(namespace, name) if name else None
