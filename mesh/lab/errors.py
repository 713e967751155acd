"""What can go wrong with a lab, said for the person who can mend it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class LabError(Exception):
    """What, where, why, and what to do; may have several lines."""


class NoSuchCommand(LabError):
    """A program that is to run in a pod and is not there."""


def require_root() -> None:
    """LabError: this is not root."""
    if os.geteuid() != 0:
        raise LabError("only root can make namespaces and enter them: run this as root")


@contextmanager
def explained() -> Iterator[None]:
    """What the operating system refuses is told as a LabError."""
    try:
        yield
    except OSError as error:
        raise LabError(f"{error.filename or 'the kernel'}: {error.strerror}") from error
