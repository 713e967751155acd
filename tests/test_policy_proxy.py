"""Policies in the proxy: requests of workloads over real sockets."""

from __future__ import annotations

from support.mesh import CLIENT, ask, mesh_proxy, service
from support.policy import closed, http, pod, policy, rule
from support.proxy import backend, cluster, get

SERVER = "127.0.0.1"


async def test_ingress_http_rules_let_what_they_allow_pass_and_answer_403_otherwise():
    async with mesh_proxy() as mesh, backend() as web:
        allow = rule("CiliumNetworkPolicy shop/web ingress[0]", 300, port=web.port,
                     http=http(method="GET", path="/public"))  # fmt: skip
        port = mesh.serve(
            cluster("web", web.port), service(),
            pod("client", CLIENT, 300), pod("web", SERVER, 301),
            policy("web", SERVER, 301, ingress=closed(allow)),
        )  # fmt: skip
        assert (await ask(port, get("/public", "web"))).status == 200
        refused = await ask(port, get("/admin", "web"))
        assert (refused.status, refused.body) == (403, b"access denied\n")
        assert len(web.requests) == 1
