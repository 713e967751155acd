"""Pairs in the real kernel: a real worker, workloads' sockets, requests that pass by the proxy."""

from __future__ import annotations
