"""The error of this package, for the person who runs the node."""

from __future__ import annotations


class DatapathError(Exception):
    """Why the kernel's part of the data path is not there: what, where, why, what to do."""
