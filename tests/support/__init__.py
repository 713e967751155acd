"""Shared by tests: real processes, real sockets."""
