"""The cluster's authority: kept in a Secret, published in a ConfigMap for agents and by
mesh.controller.bundles for pods, in the hands of the one controller that leads.

What is done is written to the Secret before anybody sees it: a bundle is published and a
certificate signed only once the state they belong to is on the server. Knows where things are kept;
what they are is known in `certs.authority`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from certs.authority import Authority, Issued, Lives
from certs.errors import AuthorityError
from certs.spiffe import SpiffeId
from certs.state import Signer
from certs.wire import BundleAnswer
from mesh.controller.bundles import KEY, Bundles
from mesh.controller.given import ROTATE, SECRET, Given
from mesh.model.nodereport import BUNDLE_KEY, BUNDLE_NAME
from mesh.sources.kubernetes_client import APPLY, MANAGER, Backoff, Client, ServerError

_log = logging.getLogger("weft.controller")

_STATE = "authority.json"
# Why what was asked for is not done, on the authority's Secret.
REFUSED = "weft.dev/rotate-refused"
_MAX_WAIT_S = 60.0
# Nodes that are named where some are waited for.
_NAMED = 5


class ClusterAuthority:
    """`run` while this controller leads, and until then `ready` is not set. `without(tag)`: the
    nodes that have another bundle in force, for people."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        trust_domain: str,
        without: Callable[[str], list[str]],
        bundles: Bundles,
        given: Given,
        lives: Lives | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        self._client = client
        self._namespace = namespace
        self._trust_domain = trust_domain
        self._without = without
        self._said: list[str] = []
        self._bundles = bundles
        self._given = given
        self._lives = lives or Lives()
        self._authority: Authority | None = None
        self._version = ""
        self._written = b""
        # The bundle that nodes are told of: its tag, and which version of the authority's it is.
        self._tag, self._published = "", 0
        self._problem = ""
        self._wake = asyncio.Event()

    def look_again(self) -> None:
        """Nodes may have taken the bundle."""
        self._wake.set()

    def sign(self, request_pem: str, allowed: frozenset[SpiffeId]) -> Issued:
        """IssueRefused: why not. Only while `ready`."""
        assert self._authority is not None
        return self._authority.sign(request_pem, allowed, time.time())

    async def run(self) -> None:
        """Until cancelled, when somebody else leads."""
        backoff = Backoff()
        while True:
            # The key is in memory only: wherever /tmp is on disk, mount memory there.
            with tempfile.TemporaryDirectory(prefix="weft-authority-") as directory:
                try:
                    await self._serve(Path(directory), backoff)
                except (ServerError, AuthorityError) as error:
                    _log.error("the authority does not work: %s", error)
                except Exception:
                    # Nodes go on with what they have; the next attempt reads everything anew.
                    _log.exception("a defect in the authority")
                finally:
                    self.ready.clear()
                    if self._authority is not None:
                        self._authority.close()
                        self._authority = None
            await backoff.wait()

    async def _serve(self, directory: Path, backoff: Backoff) -> None:
        file = directory / _STATE
        await self._load(file)
        brought = await self._given.brought(needed=not self._version)
        self._authority = Authority(
            directory, self._trust_domain, self._lives, time.time(), brought
        )
        while True:
            self._wake.clear()
            asked = await self._asked()
            brought = await self._given.brought(needed=False)
            # What follows is signed under only once it is kept.
            self.ready.clear()
            refused = self._rotate(asked, brought) if asked else ""
            lacking = self._without(self._tag)
            everywhere = self._published if self._tag and not lacking else 0
            due = self._authority.tick(time.time(), everywhere, brought)
            self._say_who_lacks(lacking, due)
            await self._save(file, {REFUSED: refused} if refused else {}, always=bool(asked))
            await self._publish()
            problem = self._authority.problem(time.time())
            if problem and problem != self._problem:
                _log.error("nothing can be issued: %s", problem)
            self._problem = problem
            self.ready.set()
            backoff.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(0.05, due - time.time()), _MAX_WAIT_S)):
                    await self._wake.wait()

    async def _asked(self) -> str:
        """What somebody asks to be rotated. ServerError 409: another controller has written."""
        if not self._given.asked:
            return ""
        found = await self._client.request("GET", f"{self._secrets}/{SECRET}")
        if _state_of(found) != self._written:
            raise ServerError(409, "Conflict", f"Secret {SECRET} is another than was written")
        self._version = found["metadata"]["resourceVersion"]
        return str((found["metadata"].get("annotations") or {}).get(ROTATE, ""))

    def _rotate(self, what: str, brought: Signer | None) -> str:
        """Why not, or ""."""
        assert self._authority is not None
        try:
            self._authority.rotate(what, time.time(), brought)
        except AuthorityError as error:
            _log.error("no rotation of the %s, which was asked for: %s", what, error)
            return str(error)
        _log.info("rotation of the %s was asked for", what)
        return ""

    def _say_who_lacks(self, lacking: list[str], due: float) -> None:
        """For whom the next root waits, if there is one."""
        assert self._authority is not None
        rotating = any(one.state == "next" for one in self._authority.describe())
        who = lacking if rotating and self._tag else []
        if who and who != self._said:
            some = ", ".join(who[:_NAMED]) + (" and others" if who[_NAMED:] else "")
            # Of one that was published just now the bound comes with the next look.
            until = datetime.fromtimestamp(due, UTC) if math.isfinite(due) else "it is looked again"
            _log.info("the next root waits for %s; at most until %s", some, until)
        self._said = who

    # --- where it is kept ------------------------------------------------------------------------

    @property
    def _secrets(self) -> str:
        return f"/api/v1/namespaces/{self._namespace}/secrets"

    async def _load(self, file: Path) -> None:
        self._version, self._written, self._tag = "", b"", ""
        try:
            found = await self._client.request("GET", f"{self._secrets}/{SECRET}")
        except ServerError as error:
            if error.status != 404:
                raise
            return
        self._version = found["metadata"]["resourceVersion"]
        self._written = _state_of(found)
        _write(file, self._written)

    async def _save(
        self, file: Path, annotations: Mapping[str, str], *, always: bool = False
    ) -> None:
        """With these annotations and no others: what was asked for is answered. ServerError 409:
        another controller has written; it has to be read again."""
        state = _read(file)
        if state == self._written and not always:
            return
        metadata: dict[str, Any] = {"name": SECRET, "namespace": self._namespace}
        metadata["annotations"] = annotations
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": metadata,
            "type": "weft.dev/authority",
            "data": {_STATE: base64.b64encode(state).decode()},
        }
        if self._version:
            metadata["resourceVersion"] = self._version
            answer = await self._client.request("PUT", f"{self._secrets}/{SECRET}", {}, body)
        else:
            answer = await self._client.request("POST", self._secrets, {}, body)
        self._version, self._written = answer["metadata"]["resourceVersion"], state

    async def _publish(self) -> None:
        assert self._authority is not None
        own = self._authority.bundle()
        bundles = {own.trust_domain: own.to_pem()}
        bundles |= {name: one.to_pem() for name, one in self._given.federated().items()}
        version = self._authority.version
        tag = hashlib.sha256(msgspec.json.encode(bundles)).hexdigest()[:16]
        if tag == self._tag:
            self._published = version
            return
        answer = BundleAnswer(tag, own.trust_domain, bundles)
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": BUNDLE_NAME, "namespace": self._namespace},
            "data": {
                BUNDLE_KEY: msgspec.json.encode(answer).decode(),
                KEY: own.to_pem(),
            },
        }
        path = f"/api/v1/namespaces/{self._namespace}/configmaps/{BUNDLE_NAME}"
        query = {"fieldManager": MANAGER, "force": "true"}
        await self._client.request("PATCH", path, query, body, content_type=APPLY)
        await self._bundles.publish(own.trust_domain, own.to_pem())
        self._tag, self._published = tag, version
        for name, pem in bundles.items():
            _log.info("trust bundle of %s: %d roots", name, pem.count("BEGIN"))


def _state_of(secret: dict[str, Any]) -> bytes:
    return base64.b64decode((secret.get("data") or {}).get(_STATE, ""))


def _read(file: Path) -> bytes:
    return file.read_bytes()


def _write(file: Path, data: bytes) -> None:
    file.touch(0o600)
    file.write_bytes(data)
