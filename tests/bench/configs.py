"""Configurations of the backend and of the hops that are other people's: text and command line.

Each peer is at its best for this work: one worker, connections kept for ever on both sides, no log
of requests, no headers added. Pure.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

Object: TypeAlias = dict[str, Any]

# One client's connections, several times over: no hop closes an upstream connection of its pool.
POOL = 128
# Rules of the route: all but the last by this header.
ROUTES, ROUTE_HEADER = 20, "x-route"
# nginx closes a connection after 1,000 requests unless told otherwise.
_FOR_EVER = 1_000_000_000


class Command(NamedTuple):
    """`config` is to be written to `file` before `argv` is run."""

    file: Path
    config: str
    argv: tuple[str, ...]


def nginx_backend(directory: Path, port: int, files: Path) -> Command:
    """Serves `files`, opened once: head and body in two calls. `small` it has in memory and answers
    in one, as most applications do."""
    small = (files / "small").read_text()
    return _nginx(
        directory / "backend.conf",
        f"""
    sendfile on;
    open_file_cache max=16 inactive=1h;
    open_file_cache_valid 1h;
    server {{
        listen {port} backlog=1024;
        root {files};
        location = /small {{ return 200 {small}; }}
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


_ENVOY_TYPES = "type.googleapis.com/envoy.extensions"


def envoy(directory: Path, listen: str, backend: str) -> Command:
    return envoy_command(
        directory / "envoy.json",
        [(listen, http_filter("backend"), None)],
        {"backend": (backend, None)},
    )


def envoy_command(
    file: Path,
    listeners: Iterable[tuple[str, Object, Object | None]],
    clusters: Mapping[str, tuple[str, Object | None]],
) -> Command:
    """The binary itself: the package's wrapper would stay in between as a process. `listeners`:
    address and port, the filter that says what becomes of connections, their TLS; `clusters`:
    address and port, TLS toward them, by name."""
    config = {
        "static_resources": {
            "listeners": [
                {
                    "name": listen,
                    "address": _socket_address(listen),
                    "filter_chains": [{"filters": [one], **_transport(tls)}],
                }
                for listen, one, tls in listeners
            ],
            "clusters": [
                {
                    "name": name,
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "load_assignment": {
                        "cluster_name": name,
                        "endpoints": [
                            {"lb_endpoints": [{"endpoint": {"address": _socket_address(at)}}]}
                        ],
                    },
                    **_transport(tls),
                }
                for name, (at, tls) in clusters.items()
            ],
        }
    }
    binary = Path(sysconfig.get_paths()["purelib"], "envoy", "_bin", "envoy")
    options = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "error")
    return Command(file, json.dumps(config, indent=1), (str(binary), "-c", str(file), *options))


def http_filter(cluster: str) -> Object:
    """HTTP/1.1 requests, unchanged."""
    manager = {
        "@type": f"{_ENVOY_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
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
                    "routes": [
                        *(
                            {"match": _by_header(number), "route": {"cluster": cluster}}
                            for number in range(ROUTES - 1)
                        ),
                        {"match": {"prefix": "/"}, "route": {"cluster": cluster}},
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": f"{_ENVOY_TYPES}.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            }
        ],
    }
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}


def _by_header(number: int) -> Object:
    exact = {"string_match": {"exact": f"value-{number}"}}
    return {"prefix": "/", "headers": [{"name": ROUTE_HEADER, **exact}]}


def tcp_filter(cluster: str) -> Object:
    """Bytes as they are."""
    proxy = {
        "@type": f"{_ENVOY_TYPES}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "client",
        "cluster": cluster,
    }
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}


def envoy_tls(chain: Path, key: Path, roots: Path, peer: str, *, server: bool) -> Object:
    """TLS 1.3 with certificates of both sides; the client sends the name of its peer and verifies
    it, the server the client's."""
    common = {
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [
            {"certificate_chain": {"filename": str(chain)}, "private_key": {"filename": str(key)}}
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(roots)},
            "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": peer}}],
        },
    }
    side = "Downstream" if server else "Upstream"
    return {
        "@type": f"{_ENVOY_TYPES}.transport_sockets.tls.v3.{side}TlsContext",
        "common_tls_context": common,
        **({"require_client_certificate": True} if server else {"sni": peer}),
    }


def _transport(tls: Object | None) -> Object:
    if tls is None:
        return {}
    return {"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls}}


def _socket_address(text: str) -> Object:
    address, _, port = text.rpartition(":")
    return {"socket_address": {"address": address, "port_value": int(port)}}


# What each makes of: directory, where to listen, the backend's address.
PEERS: dict[str, Callable[[Path, str, str], Command]] = {
    "envoy": envoy,
    "nginx": nginx,
    "haproxy": haproxy,
}
