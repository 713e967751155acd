"""The programs of the torture test, from C: a client, a backend, and a pair inside each pod."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

_SOURCES = Path(__file__).parent / "c"
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-pthread")


class Programs(NamedTuple):
    """Their files; c/NAME.c says what each does."""

    client: Path
    backend: Path
    pair: Path


def build(directory: Path) -> Programs:
    directory.mkdir(parents=True, exist_ok=True)
    made = Programs(*(directory / name for name in Programs._fields))
    for program in made:
        source = _SOURCES / f"{program.name}.c"
        subprocess.run(["gcc", *_FLAGS, "-o", program, source], check=True)
    return made
