"""Asking the authority, on this node's socket: see certs.wire. Knows HTTP, no sections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import aiohttp
import msgspec

from certs.wire import WAIT_S, Answer, BundleAnswer, IssueAnswer, IssueRequest

# What an answer may take; a question for the bundle is held on purpose.
_TIMEOUT_S = 10.0

A = TypeVar("A")


class NoAnswer(Exception):
    """The authority does not answer, or not as agreed; why, for people."""


class AuthorityClient(Protocol):
    async def sign(self, requests: Sequence[str]) -> tuple[Answer, ...]:
        """An answer for each request (PEM); where only some have one, the others are refused as
        "no_answer". NoAnswer: there is none."""

    async def bundle(self, have: str) -> BundleAnswer:
        """The trust bundles, once they are others than those with tag `have`, or after a while.
        NoAnswer: there is none."""


class SocketClient:
    """The authority behind a unix socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket)))

    async def close(self) -> None:
        await self._session.close()

    async def sign(self, requests: Sequence[str]) -> tuple[Answer, ...]:
        body = msgspec.json.encode(IssueRequest(tuple(requests)))
        answers = (await self._ask("POST", "/v1/svids", IssueAnswer, _TIMEOUT_S, body)).answers
        if len(answers) != len(requests):
            raise NoAnswer(f"{len(answers)} answers to {len(requests)} requests")
        return answers

    async def bundle(self, have: str) -> BundleAnswer:
        timeout_s = _TIMEOUT_S + (WAIT_S if have else 0)
        return await self._ask("GET", f"/v1/bundle?have={have}", BundleAnswer, timeout_s)

    async def _ask(
        self, method: str, path: str, kind: type[A], timeout_s: float, body: bytes | None = None
    ) -> A:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        url = f"http://authority{path}"
        try:
            async with self._session.request(method, url, data=body, timeout=timeout) as response:
                data = await response.read()
                if response.status != 200:
                    raise NoAnswer(f"the authority answers {response.status}: {data[:200]!r}")
                return msgspec.json.decode(data, type=kind)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            why = f"the authority does not answer at {self._socket}: {_why(error)}"
            raise NoAnswer(why) from None
        except msgspec.MsgspecError as error:
            raise NoAnswer(f"the authority at {self._socket} answers otherwise: {error}") from None


def _why(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
