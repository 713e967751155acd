"""Cilium's published example policies: each is enforced, or refused by the name of the field.

Reads ../shared/cilium and skips without it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from gateway.control import Options
from mesh.model.decode import InvalidObject, decode, key_of
from mesh.policy.spec import KINDS
from tests.gateway_world import World

POLICIES = Path(__file__).parents[2] / "shared/cilium/policies"
MESH = Options(node="n1", mesh_addresses=("127.0.0.1", "::1"))

ENFORCED = ""
NO_NAMES = ".toFQDNs: names of the DNS are not supported"
ONLY_HTTP = ".toPorts[0].rules.dns: is not supported; only http is"
NO_POD = "spec.endpointSelector: selects what is no pod (reserved:)"
NO_POD_IN_SPECS = "specs[0].endpointSelector: selects what is no pod (reserved:)"

# What becomes of each, and why.
WHAT = {
    # The field is not in the CRD; it was `authentication` that became of it.
    "auth/auth.yaml": "spec.egress[0].auth: unknown field",
    "getting-started/cilium_dkr_demo_l3-l4-policy-170817.yaml": ENFORCED,
    "getting-started/cilium_dkr_demo_l7-policy-230817.yaml": ENFORCED,
    "getting-started/l3-l4-policy.yaml": ENFORCED,
    "getting-started/l7-policy.yaml": ENFORCED,
    "kubernetes/clusterwide/clusterscope-policy.yaml": ENFORCED,
    # Weft has no endpoints of its own that are checked from other nodes.
    "kubernetes/clusterwide/health.yaml": NO_POD,
    "kubernetes/clusterwide/wildcard-from-endpoints.yaml": ENFORCED,
    "kubernetes/namespace/kubedns-policy.yaml": ENFORCED,
    "kubernetes/namespace/namespace-policy.yaml": ENFORCED,
    "kubernetes/serviceaccount/serviceaccount-policy.yaml": ENFORCED,
    "l3/cidr/cidr.yaml": ENFORCED,
    "l3/egress-allow-all/egress-allow-all.yaml": ENFORCED,
    "l3/egress-default-deny/egress-default-deny.yaml": ENFORCED,
    "l3/entities/apiserver.yaml": ENFORCED,
    "l3/entities/host.yaml": ENFORCED,
    "l3/entities/nodes.yaml": ENFORCED,
    "l3/entities/world.yaml": ENFORCED,
    "l3/fqdn/fqdn.yaml": NO_NAMES,
    "l3/ingress-allow-all/ingress-allow-all.yaml": ENFORCED,
    # "in" is none of the CRD's operators; an API server refuses it too.
    "l3/match-expressions/and-statement.yaml": ".operator: must be one of In, NotIn",
    "l3/requires/endpoints.yaml": ENFORCED,
    "l3/requires/requires.yaml": ENFORCED,
    "l3/service/service-labels.yaml": ENFORCED,
    "l3/service/service.yaml": ENFORCED,
    "l3/simple/l3.yaml": ENFORCED,
    "l3/simple/l3_egress.yaml": ENFORCED,
    "l4/cidr_l4_combined.yaml": ENFORCED,
    "l4/from_init.yaml": ENFORCED,
    "l4/icmp.yaml": ENFORCED,
    # Processes that nobody announced are no pods; the kernel has a default for them.
    "l4/init.yaml": NO_POD_IN_SPECS,
    "l4/l4.yaml": ENFORCED,
    "l4/multi_rule.yaml": ENFORCED,
    "l7/dns/dns-upgrade.yaml": ONLY_HTTP,
    "l7/dns/dns-visibility.yaml": ONLY_HTTP,
    "l7/dns/dns.yaml": NO_NAMES,
    "l7/http/http.yaml": ENFORCED,
    "l7/http/simple/l7.yaml": ENFORCED,
    # Pods for the policies beside them.
    "kubernetes/namespace/demo-pods.yaml": "no policy",
    "kubernetes/serviceaccount/demo-pods.yaml": "no policy",
}


def found() -> list[str]:
    return sorted(str(path.relative_to(POLICIES)) for path in POLICIES.rglob("*.yaml"))


def became_of(file: str) -> str:
    raws = [raw for raw in yaml.safe_load_all((POLICIES / file).read_text()) if raw]
    raws = [raw for raw in raws if raw["kind"] in KINDS]
    if not raws:
        return "no policy"
    (raw,) = raws
    try:
        policy = decode(raw)
    except InvalidObject as error:
        return str(error)
    world = World(MESH)
    world.change({policy.kind: {key_of(policy): policy}})
    status = world.statuses[policy.kind, key_of(policy)]
    assert [one.type for one in status.conditions] == ["Accepted", "Programmed"]
    return "; ".join(one.message for one in status.conditions if one.status != "True")


@pytest.mark.skipif(not POLICIES.exists(), reason="no ../shared/cilium")
def test_the_table_has_them_all() -> None:
    assert found() == sorted(WHAT)
    assert Counter(what == ENFORCED for what in WHAT.values()) == {True: 30, False: 10}


@pytest.mark.skipif(not POLICIES.exists(), reason="no ../shared/cilium")
@pytest.mark.parametrize("file", sorted(WHAT))
def test_it_is_enforced_or_refused_by_name(file: str) -> None:
    became, expected = became_of(file), WHAT[file]
    assert (became == "") if expected == ENFORCED else (expected in became)
