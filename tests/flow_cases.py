"""Flow records for tests."""

from mesh.model.flow import Flow, HttpFlow, Peer
from mesh.model.nodeconfig import LoadBalancerEntry, WorkloadSection
from mesh.model.section import entry_key, workload_key

# 2025-11-25 15:00:01.123 UTC
TIME = 1_764_082_801_123_000_000


def workload(name, address, namespace="shop", **fields):
    fields.setdefault("labels", {"app": name.partition("-")[0]})
    section = WorkloadSection(namespace, name, (address,), **fields)
    return {workload_key(namespace, name): section}


PODS = {
    **workload("web-1", "10.244.0.2", identity=300, service_account="web"),
    **workload("cart-1", "10.244.0.3", identity=301),
    **workload("cart-2", "fd00:10:244::3", identity=301),
    **workload("web-1", "10.244.0.9", namespace="test", identity=302),
    entry_key("10.96.0.10", 80, "TCP"): LoadBalancerEntry(
        "10.96.0.10", 80, "TCP", (), "Service/shop/cart"
    ),
}


def request(
    path="/items", status=200, *, method="GET", source="10.244.0.2", to="10.244.0.3", **fields
):
    """shop/web-1 to shop/cart-1."""
    fields = {"time": TIME, "verdict": "FORWARDED", "service": "shop/cart:80", **fields}
    http = HttpFlow(method, "cart", path, status, latency_ms=3.21)
    return Flow(source=Peer(source, 41234), destination=Peer(to, 8080), http=http, **fields)


def connection(source="10.244.0.2", to="10.244.0.3", port=8080, **fields):
    fields = {"time": TIME, "verdict": "FORWARDED", **fields}
    return Flow(source=Peer(source), destination=Peer(to, port), **fields)
