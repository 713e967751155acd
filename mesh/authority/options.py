"""What the authority is told on its command line.

`weft authority` shows these to users; this module checks what they gave.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from certs.authority import Lives
from certs.spiffe import BadSpiffeId, check_trust_domain
from mesh.model.meta import parse_duration


class OptionError(Exception):
    """An option cannot be used; which, why, what to do."""


class AuthorityOptions(NamedTuple):
    """`nodes`: sockets by the node's name; `brought`: directory or Secret manifest of an authority
    that is brought; `federation`: bundle files by trust domain."""

    directory: Path
    trust_domain: str
    manifests: tuple[Path, ...]
    nodes: dict[str, Path]
    lives: Lives
    brought: Path | None
    federation: dict[str, Path]

    @property
    def admin_socket(self) -> Path:
        return self.directory / "admin.sock"


def parse(arguments: list[str]) -> AuthorityOptions:
    """The command line. OptionError: a value cannot be used."""
    parser = argparse.ArgumentParser(prog="weft authority", allow_abbrev=False)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--trust-domain", default="cluster.local")
    parser.add_argument("--manifests", type=Path, action="append", required=True)
    parser.add_argument("--node", action="append", default=[])
    parser.add_argument("--svid-life", default="1h")
    parser.add_argument("--intermediate-life", default="720h")
    parser.add_argument("--root-life", default="87600h")
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--federation", action="append", default=[])
    args = parser.parse_args(arguments)
    trust_domain = _trust_domain("--trust-domain", args.trust_domain)
    federation = _pairs("--federation", "TRUST-DOMAIN=FILE", args.federation)
    for name in federation:
        if _trust_domain("--federation", name) == trust_domain:
            raise OptionError(f"--federation {name}: that is this authority's own trust domain")
    return AuthorityOptions(
        directory=args.dir.absolute(),
        trust_domain=trust_domain,
        manifests=tuple(path.absolute() for path in args.manifests),
        nodes=_pairs("--node", "NAME=SOCKET", args.node),
        lives=_lives(args),
        brought=args.ca and args.ca.absolute(),
        federation=federation,
    )


def _lives(args: argparse.Namespace) -> Lives:
    root, intermediate, svid = (
        _seconds(option, getattr(args, option[2:].replace("-", "_")))
        for option in ("--root-life", "--intermediate-life", "--svid-life")
    )
    if not svid <= intermediate <= root:
        raise OptionError(
            "--svid-life, --intermediate-life and --root-life: what is issued may not live longer "
            "than its issuer"
        )
    return Lives(root, intermediate, svid)


def _seconds(option: str, text: str) -> float:
    try:
        seconds = parse_duration(text) / 1000
    except ValueError as error:
        raise OptionError(f"{option}: {error}") from None
    if seconds < 1:
        raise OptionError(f"{option} {text}: certificates live a second or longer")
    return seconds


def _trust_domain(option: str, name: str) -> str:
    try:
        return check_trust_domain(name)
    except BadSpiffeId as error:
        raise OptionError(f"{option}: {error}") from None


def _pairs(option: str, form: str, given: list[str]) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in result:
            raise OptionError(f"{option} {text}: give {form}, each name once")
        result[name] = Path(path).absolute()
    return result
