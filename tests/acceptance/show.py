"""The last exchange of a test that failed, for people."""

from __future__ import annotations

from acceptance.client import Request, RequestFailed, Response


def show_exchange(exchange: tuple[Request, Response | RequestFailed] | None) -> None:
    if exchange is None:
        return
    request, came = exchange
    tls = f", TLS for {request.tls.server_name}" if request.tls else ""
    print(f"    to {request.address} port {request.port}, {request.protocol}{tls}:")
    print(f"    > {request.method} {request.target}\n    > host: {request.host}")
    for name, value in request.headers:
        print(f"    > {name}: {value}")
    if isinstance(came, RequestFailed):
        print(f"    failed: {came}", flush=True)
        return
    print(f"    < {came.status}")
    for name, values in came.headers.items():
        print(f"    < {name}: {', '.join(values)}")
    print("    <", came.body.decode(errors="replace").replace("\n", "\n    < "), flush=True)
