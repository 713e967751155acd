"""`weft certs` and `weft authority`: identities of a node, and the authority that vouches for them.

What is shown comes from the agent and from the authority's own socket; neither shows keys.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mesh.cli.client import CliError, UsageError, ask, ask_authority
from mesh.cli.options import MANIFESTS, output_option, run_dir_option
from mesh.cli.output import dump, table
from mesh.model.meta import say_duration


@click.group()
def certs() -> None:
    """Identities of workloads (SVIDs), trust bundles, and the authority.

    Exit codes: 0 well, 1 a problem was found, 2 wrong usage, 3 nobody answers.
    """


@certs.command("list")
@click.option(
    "--authority",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Of the authority in this directory: its own certificates, and what it did.",
)
@output_option
@run_dir_option
def list_(authority: Path | None, output: str, run_dir: Path) -> None:
    """List the identities that a node holds, or with --authority the authority's certificates.

    Exit codes: 0 all are valid and renewed, 1 some are not, 3 nobody answers.
    """
    if authority is not None:
        state = ask_authority(authority, "GET", "/v1/state")
        if output != "text":
            dump(state, output)
        else:
            _show_authority(state)
        raise SystemExit(1 if state["problem"] else 0)
    found: dict[str, Any] = ask(run_dir, "/certs")
    if output != "text":
        dump(found, output)
    elif not found["authority"]:
        click.echo("this node has no authority ('weft up --authority'), and so no identities")
    else:
        identity_table(found["identities"])
    raise SystemExit(1 if any(one["why"] for one in found["identities"]) else 0)


@certs.command()
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json", "yaml", "pem"]),
    default="text",
    help="Format; pem: the certificates themselves.",
)
@run_dir_option
def show(name: str, output: str, run_dir: Path) -> None:
    """Show the certificates of an identity or trust domain that a node has.

    NAME is a SPIFFE ID, a NAMESPACE/POD of the node, or a trust domain for its roots.

    Exit codes: 0 found, 1 there is none, 3 no gateway runs.
    """
    found: dict[str, Any] = ask(run_dir, "/certs")
    certificates = _certificates_of(found, name)
    if output == "pem":
        click.echo("".join(one["pem"] for one in certificates), nl=False)
    elif output != "text":
        dump({"items": certificates}, output)
    else:
        for number, one in enumerate(certificates):
            if number:
                click.echo()
            _show_certificate(one)


def _certificates_of(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    for one in found["identities"]:
        if name == one["spiffeId"] or name in one["workloads"]:
            if not one["certificates"]:
                raise CliError(f"there is no valid SVID of {one['spiffeId']}: {one['why']}")
            return list(one["certificates"])
    for bundle in found["bundles"]:
        if name == bundle["trustDomain"]:
            return list(bundle["certificates"])
    raise CliError(
        f"this node has no identity, pod or trust domain {name!r}: see 'weft certs list'"
    )


@certs.command()
@click.argument("what", type=click.Choice(["root", "intermediate"]))
@click.option(
    "--authority",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="The directory of the authority.",
)
@output_option
def rotate(what: str, authority: Path, output: str) -> None:
    """Replace the root or the intermediate of an authority, without a break.

    A new intermediate signs from now on. A new root is published first; once all nodes have it, it
    signs, and the old one goes when everything under it has expired: 'weft certs list --authority'
    tells how far that is.

    Exit codes: 0 it has begun, 1 it cannot, 3 no authority answers.
    """
    try:
        state = ask_authority(authority, "POST", f"/v1/rotate/{what}")
    except UsageError as error:  # what the authority refuses is no wrong usage
        raise CliError(error.message) from None
    if output != "text":
        dump(state, output)
    else:
        _show_authority(state)


@certs.command()
@click.option(
    "--authority",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="The directory of the authority.",
)
def export(authority: Path) -> None:
    """Print an authority's roots as a SPIFFE bundle document, for others to federate with.

    Exit codes: 0 well, 3 no authority answers.
    """
    dump(ask_authority(authority, "GET", "/v1/bundle"), "json")


@click.command()
@click.option(
    "--dir",
    "directory",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where its keys and certificates are, mode 0700; made if missing.",
)
@click.option(
    "--manifests",
    type=MANIFESTS,
    multiple=True,
    required=True,
    help="Directory with the Pods: which service accounts are on which node; may be repeated.",
)
@click.option(
    "--node",
    metavar="NAME=SOCKET",
    multiple=True,
    help="A node, and the socket where its agent asks; may be repeated.",
)
@click.option("--trust-domain", metavar="NAME", default="cluster.local", show_default=True)
@click.option(
    "--svid-life",
    metavar="DURATION",
    default="1h",
    show_default=True,
    help="How long the certificates of workloads are valid; agents renew them at half of it.",
)
@click.option("--intermediate-life", metavar="DURATION", default="720h", show_default=True)
@click.option("--root-life", metavar="DURATION", default="87600h", show_default=True)
@click.option(
    "--ca",
    metavar="PATH",
    type=click.Path(path_type=Path, exists=True),
    help="A root or intermediate of your own: a directory with tls.crt, tls.key and ca.crt, or the"
    " manifest of such a Secret (cert-manager's). Taken over anew whenever it changes.",
)
@click.option(
    "--federation",
    metavar="TRUST-DOMAIN=FILE",
    multiple=True,
    help="Roots of another trust domain, PEM or a SPIFFE bundle document; may be repeated.",
)
def authority(directory: Path, **options: object) -> None:
    """Run the authority of a trust domain in the foreground: it signs certificates of workloads.

    An agent gets certificates for the service accounts of pods on its own node and for nobody else;
    which node asks is known by the socket.

    Exit codes: 0 stopped as asked, 1 it cannot run, 2 wrong usage.
    """
    from mesh.cli.up import become

    become("mesh.authority.main", {"dir": directory, **options})


def identity_table(identities: list[dict[str, Any]]) -> None:
    """The identities of a node as people see them."""
    now = time.time()
    table(
        ["IDENTITY", "WORKLOADS", "ISSUER", "TIME LEFT", "STATE"],
        [
            [
                one["spiffeId"],
                ", ".join(one["workloads"]) or "the gateway's",
                one["issuer"] or "none",
                say_duration(one["notAfter"] - now) if one["notAfter"] else "none",
                one["why"] or "ok",
            ]
            for one in identities
        ],
    )


def _show_authority(state: Mapping[str, Any]) -> None:
    click.echo(f"trust domain: {state['trustDomain']}, bundle {state['version']}")
    if state["problem"]:
        click.echo(f"problem:      nothing can be issued: {state['problem']}")
    click.echo(f"federated:    {', '.join(state['federated']) or 'none'}")
    issued = ", ".join(f"{count} to {node}" for node, count in sorted(state["issued"].items()))
    click.echo(f"issued:       {issued or 'none'}")
    refused = ", ".join(
        f"{one['count']} {one['reason']} to {one['node']}" for one in state["refused"]
    )
    click.echo(f"refused:      {refused or 'none'}\n")
    now = time.time()
    table(
        ["CERTIFICATE", "STATE", "SUBJECT", "TIME LEFT"],
        [
            [
                one["role"],
                f"retiring, goes in {say_duration(one['until'] - now)}"
                if one["until"]
                else one["state"],
                one["subject"],
                say_duration(one["notAfter"] - now),
            ]
            for one in state["certificates"]
        ],
    )
    click.echo()
    table(["NODE", "BUNDLE"], [[one["name"], one["bundle"]] for one in state["nodes"]])


def _show_certificate(one: Mapping[str, Any]) -> None:
    for name, value in (
        ("subject", one["subject"] or "none"),
        ("names", ", ".join(one["names"]) or "none"),
        ("issuer", one["issuer"]),
        ("serial", one["serial"]),
        ("valid", f"{_moment(one['notBefore'])} to {_moment(one['notAfter'])}"),
        ("SHA-256", one["fingerprint"]),
    ):
        click.echo(f"{name + ':':9}{value}")


def _moment(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
