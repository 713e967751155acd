"""The authority at work: answers agents on the sockets of their nodes, and administrators on one of
its own. Who connects to a node's socket is that node: only its agent can.

Knows HTTP and which node asks; what a certificate is and when roots change is known in
`certs.authority`, which node may hold what in `mesh.authority.pods`. Shows no keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from certs.authority import Authority, Described
from certs.bundle import Bundle
from certs.errors import AuthorityError, IssueRefused
from certs.state import Signer
from certs.wire import (
    MAX_BODY,
    MAX_REQUESTS,
    WAIT_S,
    Answer,
    BundleAnswer,
    IssueAnswer,
    IssueRequest,
)
from mesh.authority.pods import Placement

_log = logging.getLogger("weft.authority")

# Certificates for one node: at once, and in the long run per second.
BURST = 512
RATE_PER_S = 64.0
# Clocks are set: no timer is trusted for longer.
_MAX_WAIT_S = 60.0


class Allowance:
    """How much a node may ask for: `BURST`, refilled at `RATE_PER_S`."""

    def __init__(self, now: float) -> None:
        self._left = float(BURST)
        self._at = now

    def take(self, count: int, now: float) -> float:
        """0: it may, and has. Else the seconds after which it may."""
        self._left = min(float(BURST), self._left + (now - self._at) * RATE_PER_S)
        self._at = now
        if self._left < count:
            return (count - self._left) / RATE_PER_S
        self._left -= count
        return 0.0


class Service:
    """What is asked of an authority, whatever the socket."""

    def __init__(
        self,
        authority: Authority,
        placement: Placement,
        nodes: tuple[str, ...],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.issued: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self._authority = authority
        self._placement = placement
        self._now = now
        self._federated: Mapping[str, Bundle] = {}
        self._brought: Signer | None = None
        self._has: dict[str, str] = dict.fromkeys(nodes, "")
        self._allowances = {node: Allowance(time.monotonic()) for node in nodes}
        self._changed = asyncio.Event()
        self._tend = asyncio.Event()
        self._answer = self._make_answer()

    # --- what changes ----------------------------------------------------------------------------

    async def tend(self) -> None:
        """For ever: rotate what is due."""
        said = ""
        while True:
            self._tend.clear()
            self._look_again()
            everywhere = self._authority.version if self._all_have_it() else 0
            try:
                due = self._authority.tick(self._now(), everywhere, self._brought)
            except AuthorityError as error:
                _log.error("%s", error)
                due = self._now() + 10
            problem = self._authority.problem(self._now())
            if problem and problem != said:
                _log.error("nothing can be issued: %s", problem)
            said = problem
            self._look_again()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(0.05, due - self._now()), _MAX_WAIT_S)):
                    await self._tend.wait()

    def federate(self, bundles: Mapping[str, Bundle]) -> None:
        """The bundles of other trust domains, from now on."""
        self._federated = bundles
        self._look_again()

    def bring(self, signer: Signer) -> None:
        """The authority that is brought, from now on, or after the rotation that is under way."""
        self._brought = signer
        self._tend.set()

    def _look_again(self) -> None:
        answer = self._make_answer()
        if answer.tag != self._answer.tag:
            _log.info(
                "trust bundle: %s",
                ", ".join(
                    f"{name}: {pem.count('BEGIN CERTIFICATE')} roots"
                    for name, pem in answer.bundles.items()
                ),
            )
            self._answer = answer
            self._changed.set()
            self._changed = asyncio.Event()

    def _make_answer(self) -> BundleAnswer:
        own = self._authority.bundle()
        bundles = {own.trust_domain: own.to_pem()}
        bundles |= {name: one.to_pem() for name, one in sorted(self._federated.items())}
        tag = hashlib.sha256(msgspec.json.encode(bundles)).hexdigest()[:16]
        return BundleAnswer(tag, own.trust_domain, bundles)

    def _all_have_it(self) -> bool:
        return all(tag == self._answer.tag for tag in self._has.values())

    # --- agents ----------------------------------------------------------------------------------

    def node_app(self, node: str) -> web.Application:
        """What a node's socket answers."""

        async def svids(request: web.Request) -> web.Response:
            return await self._svids(node, request)

        async def bundle(request: web.Request) -> web.Response:
            return await self._bundle(node, request)

        app = web.Application(client_max_size=MAX_BODY, middlewares=[_refusals])
        app.router.add_post("/v1/svids", svids)
        app.router.add_get("/v1/bundle", bundle)
        return app

    async def _svids(self, node: str, request: web.Request) -> web.Response:
        try:
            asked = msgspec.json.decode(await request.read(), type=IssueRequest).requests
        except msgspec.MsgspecError as error:
            self._refuse(node, "malformed", "not an IssueRequest")
            return _error(400, f"not an IssueRequest: {error}")
        except web.HTTPRequestEntityTooLarge:
            self._refuse(node, "too_large", "the body")
            raise
        if len(asked) > MAX_REQUESTS:
            self._refuse(node, "too_many", f"{len(asked)} at once")
            return _error(413, f"{len(asked)} requests: at most {MAX_REQUESTS} at once")
        wait_s = self._allowances[node].take(len(asked), time.monotonic())
        if wait_s:
            self._refuse(node, "too_many", f"more than {RATE_PER_S:g} a second")
            response = _error(429, f"more than {RATE_PER_S:g} certificates a second")
            response.headers["Retry-After"] = str(int(wait_s) + 1)
            return response
        answers = []
        for pem in asked:
            answers.append(self.sign(node, pem))
            await asyncio.sleep(0)  # others are answered meanwhile
        return _json(IssueAnswer(tuple(answers)))

    def sign(self, node: str, pem: str) -> Answer:
        """A certificate for what a node may hold."""
        try:
            issued = self._authority.sign(pem, self._placement.allowed(node), self._now())
        except IssueRefused as error:
            self._refuse(node, error.reason, error.why)
            return Answer(refused=error.reason, why=error.why)
        self.issued[node] += 1
        _log.info("issued %s to node %s", issued.spiffe_id, node)
        return Answer(issued.chain_pem)

    def _refuse(self, node: str, reason: str, why: str) -> None:
        self.refused[node, reason] += 1
        _log.warning("refused to node %s: %s: %s", node, reason, why)

    async def _bundle(self, node: str, request: web.Request) -> web.Response:
        return _json(await self.bundle(node, request.query.get("have", "")))

    async def bundle(self, node: str, have: str) -> BundleAnswer:
        """The trust bundles, once they are others than a node has in force, or after a while."""
        if self._has[node] != have:
            self._has[node] = have
            self._tend.set()
        if have == self._answer.tag:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await self._changed.wait()
        return self._answer

    # --- administrators --------------------------------------------------------------------------

    def admin_app(self) -> web.Application:
        """GET /v1/state; POST /v1/rotate/root and /v1/rotate/intermediate; GET /v1/bundle: the
        SPIFFE bundle document, for others to federate with."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[_refusals])
        app.router.add_get("/v1/state", self._state)
        app.router.add_get("/v1/bundle", self._document)
        app.router.add_post("/v1/rotate/{what:root|intermediate}", self._rotate)
        return app

    async def _state(self, _request: web.Request) -> web.Response:
        refused = [
            {"node": node, "reason": reason, "count": count}
            for (node, reason), count in sorted(self.refused.items())
        ]
        nodes = [
            {"name": name, "bundle": "current" if tag == self._answer.tag else "old"}
            for name, tag in sorted(self._has.items())
        ]
        return _json(
            {
                "trustDomain": self._authority.trust_domain,
                "version": self._authority.version,
                "problem": self._authority.problem(self._now()),
                "certificates": [_plain(one) for one in self._authority.describe()],
                "federated": sorted(self._federated),
                "nodes": nodes,
                "issued": dict(self.issued),
                "refused": refused,
            }
        )

    async def _document(self, _request: web.Request) -> web.Response:
        document = self._authority.bundle().to_document(self._authority.version, 300)
        return web.Response(body=document, content_type="application/json")

    async def _rotate(self, request: web.Request) -> web.Response:
        what = request.match_info["what"]
        try:
            if what == "intermediate":
                self._authority.rotate_intermediate(self._now())
            elif self._brought is None:
                self._authority.rotate_root(self._now())
            else:
                raise AuthorityError("the root was brought (--ca): replace it where it comes from")
        except AuthorityError as error:
            return _error(409, str(error))
        _log.info("rotation of the %s was asked for", what)
        self._look_again()
        self._tend.set()
        return await self._state(request)


def _plain(one: Described) -> dict[str, Any]:
    plain = one._asdict()
    plain["notBefore"], plain["notAfter"] = plain.pop("not_before"), plain.pop("not_after")
    return plain


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors of aiohttp's own as JSON, as all others."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, error.reason)


def _error(status: int, why: str) -> web.Response:
    return _json({"error": why}, status=status)


def _json(value: Any, *, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")
