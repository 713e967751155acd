"""What can go wrong with a lab, said for the person who can mend it."""

from __future__ import annotations


class LabError(Exception):
    """What, where, why, and what to do; may have several lines."""


class NoSuchCommand(LabError):
    """A program that is to run in a pod and is not there."""
