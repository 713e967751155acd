"""Keeps the module list of ARCHITECTURE.md: a line per module, the first sentence of its docstring.

Usage: scripts/modules.py           rewrite the list
       scripts/modules.py --check   exit 1 if it is not as it would be written
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
PACKAGES = ("mesh", "gateway", "l7proxy", "certs", "bpf")
_LIST = re.compile(r"(?<=<!-- modules -->\n).*?(?=<!-- /modules -->)", re.DOTALL)


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring. ValueError: it has none."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring")
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)\"`])\. (?=[A-Z`])", first)[0].rstrip(".")


def modules(package: str) -> list[Path]:
    """The package's modules: those that git knows, so that unfinished ones do not count."""
    known = subprocess.run(
        ["git", "ls-files", f"{package}/*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in sorted(known.stdout.split())]


def listing() -> str:
    lines = []
    for package in PACKAGES:
        lines += ["", f"### {package}/", ""]
        for path in modules(package):
            if path.name != "__init__.py" or path.parent.name == package:
                lines.append(f"- `{path.relative_to(ROOT)}`: {sentence(path)}.")
    return "\n".join(lines[1:]) + "\n"


def main() -> int:
    document = DOCUMENT.read_text()
    try:
        wanted = _LIST.sub(lambda _: listing(), document)
    except ValueError as error:
        print(f"modules: {error}", file=sys.stderr)
        return 1
    if "--check" not in sys.argv:
        DOCUMENT.write_text(wanted)
    elif wanted != document:
        print("modules: ARCHITECTURE.md is out of date: run scripts/modules.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
