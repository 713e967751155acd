"""The executable that runtimes start on the host: `build` compiles weft-cni.c, statically, since
the host has nothing of ours.

    python -m mesh.cni.shim      builds it, or says why not
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("weft-cni.c")
PROGRAM = Path(__file__).with_name("weft-cni")
_FLAGS = ("-Os", "-s", "-static", "-std=gnu11", "-Wall", "-Wextra", "-Werror")


def build() -> str:
    """Compiles it unless it is newer than its source. Why not, if it cannot; else ""."""
    if PROGRAM.exists() and PROGRAM.stat().st_mtime_ns > SOURCE.stat().st_mtime_ns:
        return ""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "no C compiler (apt-get install gcc libc6-dev)"
    draft = PROGRAM.with_suffix(".new")
    command = (compiler, *_FLAGS, "-o", str(draft), str(SOURCE))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{' '.join(command)}: {done.stderr.strip()}"
    draft.rename(PROGRAM)
    return ""


if __name__ == "__main__":
    if why := build():
        print(f"weft: there is no CNI plugin: {why}", file=sys.stderr)
        sys.exit(1)
