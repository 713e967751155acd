"""uvloop frees a handle twice when a half-close of its own meets a close: no code may call it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
FORBIDDEN = "write_" + "eof"


@pytest.mark.parametrize("package", ["l7proxy", "mesh", "certs", "gateway", "bpf"])
def test_the_transports_own_half_close_is_never_used(package: str) -> None:
    """Comments may explain it; names, attributes and strings may not have it."""
    for path in sorted((PROJECT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            words = [
                value
                for _, value in ast.iter_fields(node)
                if isinstance(value, str) and not isinstance(node, ast.Constant)
            ]
            assert FORBIDDEN not in words, f"{path}:{getattr(node, 'lineno', '?')}"
            if isinstance(node, ast.Constant):
                assert node.value != FORBIDDEN, f"{path}:{node.lineno}"


def test_random_closes_do_not_abort_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-m", "tests.support.http1_storm", "3"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
