"""The manifests of Weft in a cluster: one set of templates, for `weft install`, for deploy/ and for
the Helm chart. Knows text; no cluster.
"""

from __future__ import annotations

import re
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

import yaml

NAMESPACE = "weft-system"
IMAGE = "weft:0.1.0"
CNI_BIN_DIR = "/opt/cni/bin"
CNI_CONF_DIR = "/etc/cni/net.d"
# In the order in which they are made.
NAMES = ("namespace", "rbac", "load-balancer", "agent", "controller", "gatewayclass")


class Values(NamedTuple):
    """`steer`: what stands between lines "#if steer" and "#end" of the templates is there, for the
    mesh; without it Weft is an ingress gateway. So with `load_balancer`: Gateways get Services of
    that type. None: the chart decides that. The rest is what differs from cluster to cluster.
    `settings` and the arguments begin with a line end, where there are any, and are indented as
    they stand."""

    namespace: str = NAMESPACE
    image: str = IMAGE
    trust_domain: str = "cluster.local"
    settings: str = "\n    access_log: json"
    agent_args: str = ""
    controller_args: str = ""
    steer: bool | None = True
    load_balancer: bool | None = False
    cni_bin_dir: str = CNI_BIN_DIR
    cni_conf_dir: str = CNI_CONF_DIR


def _more(name: str) -> str:
    """Arguments out of a list."""
    lines = ("{{- range .Values." + name + " }}", "- {{ . | quote }}", "{{- end }}")
    return "".join(f"\n        {line}" for line in lines)


# As the chart's templates have them, and what of them its values.yaml says.
CHART = Values(
    namespace="{{ .Release.Namespace }}",
    image="{{ .Values.image }}",
    trust_domain="{{ .Values.trustDomain }}",
    settings="\n    {{- .Values.settings | toYaml | nindent 4 }}",
    agent_args=_more("agentArgs"),
    controller_args=_more("controllerArgs"),
    steer=None,
    load_balancer=None,
    cni_bin_dir="{{ .Values.cniBinDir }}",
    cni_conf_dir="{{ .Values.cniConfDir }}",
)
CHART_VALUES = f"""\
# The image of Weft: built with deploy/Dockerfile, in a registry that the nodes reach.
image: {IMAGE}
# Whose identities workloads have: spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT.
trustDomain: cluster.local
# Whether nodes steer and filter the connections of their pods, with eBPF and a CNI plugin; false:
# Weft is an ingress gateway alone, with fewer rights.
steer: true
# Whether each Gateway that names no address gets a Service of type LoadBalancer; false: the
# controller may write no Services.
loadBalancer: false
# Where the nodes' container runtime looks for CNI plugins, and for the list of them.
cniBinDir: {CNI_BIN_DIR}
cniConfDir: {CNI_CONF_DIR}
# Limits and habits of the proxy: README.md, "Settings".
settings:
  access_log: json
# More arguments of "weft up" and of "weft controller".
agentArgs: []
controllerArgs: []
"""


def rendered(name: str, values: Values) -> str:
    """One template's text; "": there is nothing in it with these values."""
    text = (files("mesh.install") / "templates" / f"{name}.yaml").read_text()
    for field, of_chart in (("steer", "steer"), ("load_balancer", "loadBalancer")):
        there: bool | None = getattr(values, field)
        kept = r"\1" if there else ""
        if there is None:
            kept = f"{{{{- if .Values.{of_chart} }}}}\n\\1{{{{- end }}}}\n"
        text = re.sub(rf"^ *#if {field}\n(.*?)^ *#end\n", kept, text, flags=re.M | re.S)
    return Template(text).substitute(values._asdict())


def everything(**values: Any) -> str:
    """All of it, as one stream of documents. `values`: those of Values that differ."""
    return "---\n".join(filter(None, (rendered(name, Values(**values)) for name in NAMES)))


def objects(**values: Any) -> list[dict[str, Any]]:
    """All of it as plain data, in order; as `everything`."""
    return list(yaml.safe_load_all(everything(**values)))
