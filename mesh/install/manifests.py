"""The manifests of Weft in a cluster: one set of templates, for `weft install`, for deploy/ and for
the Helm chart. Knows text; no cluster.
"""

from __future__ import annotations

from importlib.resources import files
from string import Template
from typing import Any

import yaml

NAMESPACE = "weft-system"
IMAGE = "weft:0.1.0"
# In the order in which they are made.
NAMES = ("namespace", "rbac", "agent", "controller", "gatewayclass")


def rendered(name: str, *, namespace: str = NAMESPACE, image: str = IMAGE) -> str:
    """One template's text."""
    text = (files("mesh.install") / "templates" / f"{name}.yaml").read_text()
    return Template(text).substitute(namespace=namespace, image=image)


def everything(*, namespace: str = NAMESPACE, image: str = IMAGE) -> str:
    """All of it, as one stream of documents."""
    return "---\n".join(rendered(name, namespace=namespace, image=image) for name in NAMES)


def objects(*, namespace: str = NAMESPACE, image: str = IMAGE) -> list[dict[str, Any]]:
    """All of it as plain data, in order."""
    return list(yaml.safe_load_all(everything(namespace=namespace, image=image)))
