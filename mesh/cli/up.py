"""`weft up`: checks what was given, then becomes the supervisor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from gateway.control import ControlPlane, Options
from mesh.agent.options import OptionError, manifests, parse_admin, plane_options, steering
from mesh.cli.client import UsageError
from mesh.cni import kubepods


def plane(options: dict[str, Any]) -> Options:
    """The control plane's options. CliError: one of them is wrong."""
    arguments = argparse.Namespace(**{"access_log": None, **options})
    try:
        result = plane_options(arguments)
        ControlPlane(result)
    except (OptionError, ValueError) as error:
        raise UsageError(str(error)) from None
    return result


def run(options: dict[str, Any]) -> None:
    """Replace this process by the supervisor: the imports of the command line need not stay."""
    if (root := options.pop("steer_pods")) is not None:
        if options["steer"] is not None:
            raise UsageError("--steer-pods stands in the place of --steer: give one of them")
        options["steer"], found = kubepods.find(root)
        options["proxy_cgroup"] = options["proxy_cgroup"] or found
    plane(options)
    try:
        arguments = argparse.Namespace(**options)
        manifests(arguments)
        steering(arguments)
        parse_admin(options["admin"])
    except OptionError as error:
        raise UsageError(str(error)) from None
    become("mesh.agent.supervisor", options)


def become(module: str, options: Mapping[str, object]) -> NoReturn:
    """Run a module in this process's place, with options as they were given here."""
    arguments = []
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                text = os.path.abspath(one) if isinstance(one, os.PathLike) else str(one)
                arguments.append(f"--{name.replace('_', '-')}={text}")
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
