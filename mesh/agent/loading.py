"""Testing this kernel and loading the eBPF programs, in short-lived processes of ours.

Knows what is asked for and what the self-test says of it, nothing of what is in the maps.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from bpf import attach, selftest
from bpf.errors import DatapathError
from mesh.agent.options import Steering

_log = logging.getLogger("weft.agent")


class Verdict(NamedTuple):
    """Why nothing can be steered on this kernel, why nothing can be sent by redirect, and why no
    request can pass by the proxy, with the name of the check; None: it can."""

    steering: str | None
    redirect: str | None
    pairs: str | None


def check_places(options: Steering) -> None:
    """DatapathError: the cgroups are not as they have to be."""
    beside = options.proxy_cgroup
    if not beside.exists():
        raise DatapathError(
            f"the cgroup {beside} for Weft's own processes could not be made: it takes root, "
            "or name one that is there with --proxy-cgroup"
        )
    attach.check_cgroup(beside)
    if options.cgroup.is_relative_to(beside):
        raise DatapathError(
            f"{options.cgroup} (--steer) lies in {beside} (--proxy-cgroup), so workloads would be "
            "taken for the proxy: name one beside it, or inside"
        )
    # The supervisor has joined it before the proxies' listening sockets were made.
    if not attach.is_member(beside, os.getpid()):
        raise DatapathError(
            f"Weft's own processes are not in {beside}, by which the kernel would know the "
            "proxy's sockets: give --proxy-cgroup one that may have processes (a leaf without "
            "controllers of its children), and start Weft anew"
        )


async def test(options: Steering) -> Verdict:
    """The self-test. DatapathError: it could not be made."""
    beside = options.proxy_cgroup
    where, name = beside.parent, f"{beside.name}.selftest"
    if options.nested:
        # A pod's processes can move no further than into what lies in its own (cgroups(7),
        # "Cgroup v2 delegation: nsdelegate").
        where, name = beside, "selftest"
    place = (f"--directory={options.pins.parent}", f"--cgroup={where}", f"--name={name}")
    said = await _run("bpf.selftest", *place, "--json")
    wrong = [one for one in msgspec.json.decode(said, type=list[selftest.Check]) if not one.ok]
    for check in wrong:
        _log.error("self-test: %s: %s: %s", check.name, selftest.FACTS[check.name], check.why)
    redirect = [check for check in wrong if check.name not in selftest.PAIR_FACTS]
    basic = [check for check in redirect if check.name not in selftest.REDIRECT_FACTS]
    return Verdict(_first(basic), _first(redirect), _first(wrong))


async def load(pins: Path) -> None:
    """The loader. DatapathError: what was in the way."""
    await _run("bpf.loader", f"--pin={pins}")


def _first(checks: list[selftest.Check]) -> str | None:
    return f"{checks[0].name}: {checks[0].why}" if checks else None


async def _run(module: str, *arguments: str) -> bytes:
    """What it printed. DatapathError: it failed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, complained = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        raise
    why = complained.decode(errors="replace").strip().removeprefix("weft: ")
    if process.returncode != 0:
        raise DatapathError(why or f"{module} ended with status {process.returncode}")
    return said
