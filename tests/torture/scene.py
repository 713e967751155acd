"""The lab of the torture test: clients and backends in pods of two nodes and two namespaces.

Each pod also has a loopback pair with the same addresses and ports as every other pod's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from torture.programs import Programs

NAMESPACES = ("red", "blue")
BACKEND_PORT = 8080
# The rule for programs that splice(2): they would hang.
_OFF = {"weft.dev/sockmap": "disabled"}

_NGINX = """
daemon off;
user root;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1000; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 0;
    keepalive_requests 1000000;
    upstream backend {{ server 127.0.0.1:8081; keepalive 16; }}
    server {{
        listen 8080;
        listen [::]:8080;
        sendfile on;
        location /f/ {{ alias {directory}/files/; add_header x-id $http_x_id; }}
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_request_buffering off;
            proxy_buffering off;
        }}
    }}
}}
"""
_HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout client 60s
    timeout server 60s
    timeout connect 5s
    {option}
frontend f
    bind :::8080 v4v6
    default_backend b
backend b
    server s 127.0.0.1:8081
"""


class Target(NamedTuple):
    """What clients ask: HOST/PORT/LETTERS (c/client.c), and its pods as NAMESPACE/NAME.
    `redirected`: whether the pods get bytes by redirect, None: no matter. `seen`: they cannot say
    so themselves, but their sockets are looked at."""

    text: str
    pods: tuple[str, ...]
    redirected: bool | None = None
    seen: bool = False

    @property
    def host(self) -> str:
        return self.text.partition("/")[0]

    def passes(self, pod: str) -> bool:
        """Whether requests to a pod of its own node may pass by the proxy, as what reaches it by
        redirect may."""
        return self.redirected is True and pod in self.pods


class Scene(NamedTuple):
    """`config` is a lab.yaml; `clients` are pods, NAMESPACE/NAME."""

    config: str
    clients: tuple[str, ...]
    targets: tuple[Target, ...]


class _Scene:
    def __init__(self, programs: Programs, directory: Path) -> None:
        self._programs = programs
        self._directory = directory
        self.pods: list[dict[str, Any]] = []
        self.services: list[dict[str, Any]] = []

    def pod(self, namespace: str, name: str, node: str, command: str, **more: Any) -> str:
        key = f"{namespace}/{name}"
        self.pods.append(
            {
                "name": name,
                "namespace": namespace,
                "node": node,
                "command": ["sh", "-c", f"{self._programs.pair} {key} & {command}"],
                **more,
            }
        )
        return key

    def backend(
        self,
        namespace: str,
        app: str,
        nodes: str,
        letters: str,
        command: str,
        redirected: bool | None = None,
        annotations: dict[str, str] | None = None,
    ) -> Target:
        """A Service and a pod of it on each of the nodes."""
        pods = tuple(
            self.pod(
                namespace,
                f"{app}-{node}",
                node,
                f"exec {command}",
                labels={"app": app},
                ports=[{"port": BACKEND_PORT}],
                annotations=annotations or {},
            )
            for node in nodes
        )
        ports = [
            {"name": "http", "port": 80, "targetPort": BACKEND_PORT},
            # Not declared to be HTTP: straight to the pod, or by the relay.
            {"name": "raw", "port": 81, "targetPort": BACKEND_PORT},
        ]
        self.services.append({"name": app, "namespace": namespace, "ports": ports})
        return Target(f"{app}.{namespace}/80/{letters}", pods, redirected, seen="8081" in command)


def make_scene(programs: Programs, directory: Path, name: str) -> Scene:
    """`directory` takes files of the backends."""
    files = directory / "files"
    files.mkdir(parents=True, exist_ok=True)
    subprocess.run([programs.client, "files", files], check=True)
    nginx, haproxy, splicing = (directory / f"{one}.conf" for one in ("nginx", "haproxy", "splice"))
    nginx.write_text(_NGINX.format(directory=directory))
    haproxy.write_text(_HAPROXY.format(option=""))
    splicing.write_text(_HAPROXY.format(option="option splice-request\n    option splice-response"))

    scene = _Scene(programs, directory)
    own = str(programs.backend)
    behind = f"sh -c '{own} 8081 & exec"
    echoes = [scene.backend(one, "echo", "ab", "dpbh", f"{own} 8080", True) for one in NAMESPACES]
    raw = [Target(one.text.replace("/80/", "/81/"), one.pods) for one in echoes]
    in_front = scene.backend("blue", "nginx", "b", "p", f"{behind} nginx -c {nginx}'", True)
    targets = (
        *echoes,
        *raw,
        scene.backend("red", "asks", "a", "dpbh", f"{own} -a 8080", True),
        scene.backend("blue", "defers", "a", "dpbh", f"{own} -d 8080", False),
        scene.backend("red", "splices", "b", "dpbh", f"{own} -s 8080", False, _OFF),
        in_front,
        Target("nginx.blue/80/fp", in_front.pods),
        scene.backend("red", "haproxy", "b", "dp", f"{behind} haproxy -f {haproxy}'", True),
        scene.backend(
            "blue", "splicing", "a", "dp", f"{behind} haproxy -f {splicing}'", None, _OFF
        ),
    )
    clients = tuple(
        scene.pod(namespace, f"client-{node}", node, "wait")
        for namespace in NAMESPACES
        for node in "ab"
    )
    config = {
        "name": name,
        "nodes": [{"name": "a"}, {"name": "b"}],
        "pods": scene.pods,
        "services": scene.services,
    }
    return Scene(yaml.safe_dump(config), clients, targets)
