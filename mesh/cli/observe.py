"""`weft observe`: flow records of running gateways, those there are and those that come."""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import click
import msgspec

from mesh.agent.flows import Line
from mesh.agent.rundir import RunDir
from mesh.cli import flow_lines
from mesh.cli.client import CliError, NotRunningError, UsageError, ask_stream
from mesh.cli.output import note

_DEFAULT_LAST = 20
# An agent that has ended is asked for again this often.
_RETRY_S = 0.2
# Lines read and not yet printed; past it the agent's queue fills, and it counts what is lost.
_AHEAD = 1_000

Query: TypeAlias = list[tuple[str, str]]
_decoder = msgspec.json.Decoder(Line)


def run(
    run_dirs: Sequence[Path],
    filters: Mapping[str, Sequence[str]],
    since: str | None,
    last: int | None,
    follow: bool,
    output: str,
) -> None:
    """Exit 0, also when whoever reads has seen enough."""
    query = [
        (name.strip("_").replace("_", "-"), value)
        for name, values in filters.items()
        for value in values
    ]
    if since is not None:
        query.append(("since", since))
    elif last is None:
        last = _DEFAULT_LAST
    if last is not None:
        query.append(("last", str(last)))
    try:
        if follow:
            _follow(run_dirs, query, output)
        else:
            _show(run_dirs, query, last, output)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Nothing is left to say, not even by the interpreter as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _show(run_dirs: Sequence[Path], query: Query, last: int | None, output: str) -> None:
    lines = [
        _decoder.decode(text)
        for run_dir in run_dirs
        for text in ask_stream(run_dir, "/flows", query)
        if text is not None
    ]
    flows = sorted((line for line in lines if line.flow is not None), key=_time)
    for line in lines:
        if line.lost is not None:
            _print(line, output)
    for line in flows[-last:] if last else flows:
        _print(line, output)
    if not flows:
        note("no flow records")


def _follow(run_dirs: Sequence[Path], query: Query, output: str) -> None:
    """Records of several gateways come as they are told, not strictly by time."""
    told: queue.Queue[Line | CliError] = queue.Queue(_AHEAD)
    for run_dir in run_dirs:
        threading.Thread(target=_read, args=(run_dir, query, told), daemon=True).start()
    following = len(run_dirs)
    while True:
        batch = [told.get()]
        while not told.empty():
            batch.append(told.get())
        ends = [one for one in batch if isinstance(one, CliError)]
        for line in sorted((one for one in batch if isinstance(one, Line)), key=_time):
            _print(line, output)
        for error in ends:
            following -= 1
            if not following or type(error) is not NotRunningError:
                raise error
            note(f"weft: {error.message}")


def _read(run_dir: Path, query: Query, told: queue.Queue[Line | CliError]) -> None:
    """In a thread: what an agent tells, and the agents after it, into the queue; last of all why it
    ended."""
    begun, there, newest = False, False, 0
    while True:
        try:
            for text in ask_stream(run_dir, "/flows", [*query, ("follow", "1")]):
                if text is None:
                    begun = there = True
                else:
                    line = _decoder.decode(text)
                    newest = max(newest, line.flow.time if line.flow is not None else 0)
                    told.put(line)
        except CliError as error:
            # An agent that does not answer may be about to.
            if not begun or isinstance(error, UsageError):
                told.put(error)
                return
        if RunDir(run_dir).holder() is None:
            told.put(NotRunningError(f"the gateway in {run_dir} has ended"))
            return
        if there:
            there = False
            note(f"weft: the agent in {run_dir} has ended: following the next one")
            # All that the next one has is new, however old.
            query = [pair for pair in query if pair[0] not in ("last", "since")]
            query.append(("after", str(newest)))
        time.sleep(_RETRY_S)


def _time(line: Line) -> float:
    return line.flow.time if line.flow is not None else math.inf


def _print(line: Line, output: str) -> None:
    if line.flow is None:
        assert line.lost is not None
        if output == "json":
            click.echo(json.dumps({"lost": msgspec.to_builtins(line.lost)}))
        else:
            note(f"weft: {flow_lines.lost_text(line.lost)}")
    elif output == "json":
        click.echo(flow_lines.as_json(line.flow))
    else:
        click.echo(flow_lines.compact(line.flow, wide=output == "wide"))
