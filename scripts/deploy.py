"""Writes deploy/: the manifests of `weft install` with a kustomization, and as a Helm chart.

`--check` writes nothing and fails where something is not as it would be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from mesh.install import manifests  # noqa: E402

_WRITTEN = "# Written by scripts/deploy.py from mesh/install/templates: change it there.\n"
# For kubectl: with the mesh, and an ingress gateway alone.
_PLAIN = {
    "manifests": manifests.Values(),
    "gateway-only": manifests.Values(steer=False),
}
_CHART = f"""\
apiVersion: v2
name: weft
description: Gateway API without sidecars
version: 0.1.0
appVersion: {manifests.IMAGE.partition(":")[2]}
kubeVersion: ">=1.30.0-0"
"""
# For kubectl, with either of those.
_COMPONENT = """\
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
resources: [rbac.yaml]
patches:
- target: {kind: Deployment, name: weft-controller}
  patch: |-
    - {op: add, path: /spec/template/spec/containers/0/args/-, value: --load-balancer}
"""
_BALANCED = manifests.Values(load_balancer=True)
_IMAGE = """\
# The image of Weft, as the nodes pull it: sed -i 's|newName: .*|newName: REGISTRY/weft|' this file.
"""
_NOTES = """\
Agents have the network of their nodes, and rights to eBPF unless steer is false. Where the cluster
looks at that ("Pod Security Admission"), say that they may:

  kubectl label namespace {{ .Release.Namespace }} pod-security.kubernetes.io/enforce=privileged

Then "weft check" says whether all is well.
"""


def content() -> dict[str, str]:
    """What stands in which file."""
    result = {}
    for name in manifests.NAMES:
        for directory, values in _PLAIN.items():
            if text := manifests.rendered(name, values):
                result[f"{directory}/{name}.yaml"] = _WRITTEN + text
        if name != "namespace":
            # Helm makes the namespace: helm install --create-namespace -n weft-system.
            result[f"chart/templates/{name}.yaml"] = _WRITTEN + manifests.rendered(
                name, manifests.CHART
            )
    plain = (name for name in manifests.NAMES if manifests.rendered(name, manifests.Values()))
    listed = "".join(f"- {name}.yaml\n" for name in plain)
    head = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
    name, _, tag = manifests.IMAGE.partition(":")
    image = f"{_IMAGE}images:\n- name: {name}\n  newName: {name}\n  newTag: {tag}\n"
    for directory in _PLAIN:
        result[f"{directory}/kustomization.yaml"] = f"{_WRITTEN}{head}resources:\n{listed}{image}"
    balancer = manifests.rendered("load-balancer", _BALANCED)
    result["load-balancer/rbac.yaml"] = _WRITTEN + balancer
    result["load-balancer/kustomization.yaml"] = _WRITTEN + _COMPONENT
    result["chart/templates/NOTES.txt"] = _NOTES
    result["chart/Chart.yaml"] = _WRITTEN + _CHART
    result["chart/values.yaml"] = _WRITTEN + manifests.CHART_VALUES
    return result


def main() -> int:
    deploy = PROJECT / "deploy"
    wrong = [
        path
        for path, text in content().items()
        if not (deploy / path).exists() or (deploy / path).read_text() != text
    ]
    if sys.argv[1:] == ["--check"]:
        for path in wrong:
            print(f"deploy/{path} is not as scripts/deploy.py writes it: run it", file=sys.stderr)
        return 1 if wrong else 0
    for path in wrong:
        (deploy / path).parent.mkdir(parents=True, exist_ok=True)
        (deploy / path).write_text(content()[path])
        print(f"deploy/{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
