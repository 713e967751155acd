"""A backend of the lab's shop: answers in JSON which pod it is, and what it was asked.

Usage: backend.py PORT. Listens on all addresses of its pod.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Backend(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answer = {
            "pod": os.environ["POD_NAME"],
            "namespace": os.environ["POD_NAMESPACE"],
            "node": os.environ["NODE_NAME"],
            "client": self.client_address[0],
            "saw": f"{self.command} {self.path}",
            "host": self.headers.get("Host"),
        }
        body = json.dumps(answer).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


class Server(ThreadingHTTPServer):
    """IPv6, and IPv4 as mapped addresses."""

    address_family = socket.AF_INET6


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: backend.py PORT")
    Server(("::", int(sys.argv[1])), Backend).serve_forever()
