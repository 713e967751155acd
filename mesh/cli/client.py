"""Asking the agent: JSON over its unix socket. Says what to do when nobody answers."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from mesh.agent.rundir import RunDir

_TIMEOUT_S = 30.0
_READ = 1 << 16


class CliError(click.ClickException):
    """One line that says what, where, why and what to do."""

    def show(self, file: Any = None) -> None:
        click.echo(f"weft: {self.message}", err=True)


class UsageError(CliError):
    """What was given cannot be used."""

    exit_code = 2


class NotRunningError(CliError):
    """No gateway answers."""

    exit_code = 3


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def ask(run_dir: Path, path: str, query: Iterable[tuple[str, str]] = ()) -> Any:
    """The agent's answer. CliError: there is none, or it is an error."""
    place = RunDir(run_dir)
    with _asked(place.api_socket, "GET", path, query, lambda error: _unreachable(place, error)) as (
        response,
        _,
    ):
        return json.loads(response.read())


def ask_authority(directory: Path, method: str, path: str) -> Any:
    """The answer of the authority in a directory. CliError: there is none, or it is an error."""

    def unreachable(error: Exception) -> CliError:
        return NotRunningError(
            f"no authority answers in {directory} ({error}): start one with 'weft authority', or "
            "name its directory with --authority"
        )

    with _asked(directory / "admin.sock", method, path, (), unreachable) as (response, _):
        return json.loads(response.read())


def ask_stream(
    run_dir: Path, path: str, query: Iterable[tuple[str, str]] = ()
) -> Iterator[bytes | None]:
    """The lines of an answer as they come, for as long as it takes; None first, once it has begun.
    CliError: there is no answer, it is an error, or it broke off."""
    place = RunDir(run_dir)
    with _asked(place.api_socket, "GET", path, query, lambda error: _unreachable(place, error)) as (
        response,
        sock,
    ):
        yield None
        sock.settimeout(None)
        rest = b""
        # Not readline(): to that an answer which breaks off is one that ends.
        while data := response.read1(_READ):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


@contextmanager
def _asked(
    where: Path,
    method: str,
    path: str,
    query: Iterable[tuple[str, str]],
    unreachable: Callable[[Exception], CliError],
) -> Iterator[tuple[http.client.HTTPResponse, socket.socket]]:
    text = urlencode(list(query))
    connection = _UnixConnection(where)
    try:
        connection.request(method, f"{path}?{text}" if text else path)
        sock = connection.sock
        with connection.getresponse() as response:
            if response.status != 200:
                answer = json.loads(response.read())
                raise UsageError(str(answer.get("error", response.reason)))
            yield response, sock
    except PermissionError:
        raise CliError(
            f"no permission for {where}: run this as the user who runs what listens there"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise unreachable(error) from None
    finally:
        connection.close()


def _unreachable(place: RunDir, error: Exception) -> CliError:
    holder = place.holder()
    if holder is None:
        return NotRunningError(
            f"no gateway runs in {place.path}: start one with 'weft up --manifests DIR', or name "
            "its directory with --run-dir"
        )
    return CliError(
        f"the gateway in {place.path} (pid {holder.get('pid', 'unknown')}) runs, but its agent "
        f"does not answer ({error or type(error).__name__}): it may be starting; try again"
    )
