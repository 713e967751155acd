"""Configurations of the backend and of the hops that are other people's: text and command line.

Each peer is at its best for this work: one worker, connections kept for ever on both sides, no log
of requests, no headers added. Pure.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# One client's connections, several times over: no hop closes an upstream connection of its pool.
POOL = 128
# nginx closes a connection after 1,000 requests unless told otherwise.
_FOR_EVER = 1_000_000_000


class Command(NamedTuple):
    """`config` is to be written to `file` before `argv` is run."""

    file: Path
    config: str
    argv: tuple[str, ...]


def nginx_backend(directory: Path, port: int, files: Path) -> Command:
    """Serves `files`, opened once."""
    return _nginx(
        directory / "backend.conf",
        f"""
    sendfile on;
    open_file_cache max=16 inactive=1h;
    open_file_cache_valid 1h;
    server {{
        listen {port} backlog=1024;
        root {files};
    }}""",
    )


def nginx(directory: Path, listen: str, backend: str) -> Command:
    """A response larger than its buffers waits for the client in memory, not in a file."""
    return _nginx(
        directory / "nginx.conf",
        f"""
    upstream backend {{
        server {backend};
        keepalive {POOL};
        keepalive_requests {_FOR_EVER};
        keepalive_timeout 1h;
    }}
    server {{
        listen {listen} backlog=1024;
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffers 16 32k;
            proxy_busy_buffers_size 128k;
            proxy_max_temp_file_size 0;
        }}
    }}""",
    )


def _nginx(file: Path, servers: str) -> Command:
    scratch = "".join(
        f"\n    {kind}_temp_path {file.parent}/{file.stem}-{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = f"""daemon off;
user root;
worker_processes 1;
pid {file.with_suffix(".pid")};
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    server_tokens off;
    keepalive_timeout 1h;
    keepalive_requests {_FOR_EVER};{scratch}{servers}
}}
"""
    return Command(file, config, ("nginx", "-e", "stderr", "-c", str(file)))


def haproxy(directory: Path, listen: str, backend: str) -> Command:
    """With its default buffers of 16 KiB, large responses cost it four times the CPU."""
    file = directory / "haproxy.cfg"
    config = f"""global
    nbthread 1
    tune.bufsize 65536
    maxconn 4096
defaults
    mode http
    option http-keep-alive
    http-reuse always
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout http-keep-alive 1h
frontend client
    bind {listen}
    default_backend server
backend server
    server backend {backend} pool-max-conn {POOL}
"""
    return Command(file, config, ("haproxy", "-db", "-q", "-f", str(file)))


def envoy(directory: Path, listen: str, backend: str) -> Command:
    """The binary itself: the package's wrapper would stay in between as a process."""
    file = directory / "envoy.json"
    types = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "client",
        "codec_type": "HTTP1",
        "generate_request_id": False,
        "skip_xff_append": True,
        "server_header_transformation": "PASS_THROUGH",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "backend"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": f"{types}.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            }
        ],
    }
    manager_filter = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": manager,
    }
    config = {
        "static_resources": {
            "listeners": [
                {
                    "name": "client",
                    "address": _socket_address(listen),
                    "filter_chains": [{"filters": [manager_filter]}],
                }
            ],
            "clusters": [
                {
                    "name": "backend",
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "load_assignment": {
                        "cluster_name": "backend",
                        "endpoints": [
                            {"lb_endpoints": [{"endpoint": {"address": _socket_address(backend)}}]}
                        ],
                    },
                }
            ],
        }
    }
    binary = Path(sysconfig.get_paths()["purelib"], "envoy", "_bin", "envoy")
    options = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "error")
    return Command(file, json.dumps(config, indent=1), (str(binary), "-c", str(file), *options))


def _socket_address(text: str) -> dict[str, object]:
    address, _, port = text.rpartition(":")
    return {"socket_address": {"address": address, "port_value": int(port)}}


# What each makes of: directory, where to listen, the backend's address.
PEERS: dict[str, Callable[[Path, str, str], Command]] = {
    "envoy": envoy,
    "nginx": nginx,
    "haproxy": haproxy,
}
