"""Asking the cluster's authority: CertificateSigningRequests of signer weft.dev/workload, and the
trust bundle in a ConfigMap. Knows the API server; no sections.

Source: https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from certs.wire import WAIT_S, Answer, BundleAnswer
from mesh.agent.authority import NoAnswer
from mesh.model.nodereport import BUNDLE_KEY, BUNDLE_NAME, SIGNER
from mesh.sources.kubernetes_client import Client, ServerError

T = TypeVar("T")

# How long a request may wait for its certificate.
_SIGN_S = 30.0
_AT_ONCE = 8
_REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_USAGES = ["digital signature", "client auth", "server auth"]


class ClusterAuthority:
    """An AuthorityClient; `have` is the tag of the bundle that this node has in force."""

    def __init__(self, client: Client, node: str, namespace: str) -> None:
        self.have = ""
        self._client = client
        self._node = node
        self._bundles = f"/api/v1/namespaces/{namespace}/configmaps"
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def close(self) -> None:
        """The connection is the source's."""

    async def sign(self, requests: Sequence[str]) -> tuple[Answer, ...]:
        asked = (self._sign(request) for request in requests)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failed = [one for one in answers if isinstance(one, BaseException)]
        for error in failed:
            # What has been signed counts, whatever has become of the others.
            if len(failed) == len(answers) or not isinstance(error, NoAnswer):
                raise error
        return tuple(
            Answer(refused="no_answer", why=str(one)) if isinstance(one, BaseException) else one
            for one in answers
        )

    async def _sign(self, request: str) -> Answer:
        body = {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"generateName": f"weft-{self._node}-"},
            "spec": {
                "request": base64.b64encode(request.encode()).decode(),
                "signerName": SIGNER,
                "usages": _USAGES,
            },
        }
        try:
            async with asyncio.timeout(_SIGN_S), self._turn:
                made = await self._client.request("POST", _REQUESTS, {}, body)
                return await self._answered(made["metadata"])
        except TimeoutError:
            raise NoAnswer(
                f"no controller has signed a request within {_SIGN_S:g} s: is one running?"
            ) from None
        except ServerError as error:
            raise NoAnswer(f"a certificate cannot be asked for: {error}") from None

    async def _answered(self, metadata: dict[str, Any]) -> Answer:
        while True:
            answer = await self._watched(_REQUESTS, metadata, _answer)
            if answer is not None:
                return answer

    async def _watched(
        self, path: str, metadata: dict[str, Any], read: Callable[[dict[str, Any]], T | None]
    ) -> T | None:
        """What `read` makes of an object's versions after the one given, once that is something;
        None: the stream ended."""
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={metadata['name']}",
            "resourceVersion": metadata["resourceVersion"],
        }
        async with self._client.stream(path, query) as lines:
            async for line in lines:
                event = msgspec.json.decode(line)
                if event["type"] == "ERROR":
                    raise ServerError(event["object"].get("code", 0), "", "the watch broke")
                if (found := read(event["object"])) is not None:
                    return found
        return None

    async def bundle(self, have: str) -> BundleAnswer:
        def other(obj: dict[str, Any]) -> BundleAnswer | None:
            answer = _bundle(obj)
            return answer if answer.tag != have else None

        # Who asks anew after a failure has still the one before.
        self.have = have or self.have
        try:
            found = await self._client.request("GET", f"{self._bundles}/{BUNDLE_NAME}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    metadata = found["metadata"]
                    return other(found) or (
                        await self._watched(self._bundles, metadata, other) or _bundle(found)
                    )
            return _bundle(found)
        except ServerError as error:
            raise NoAnswer(f"there is no trust bundle yet: {error}") from None


def _answer(request: dict[str, Any]) -> Answer | None:
    """What became of a request, if anything has."""
    status = request.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["type"] in ("Denied", "Failed"):
            return Answer(refused=condition.get("reason", ""), why=condition.get("message", ""))
    if certificate := status.get("certificate"):
        return Answer(base64.b64decode(certificate).decode())
    return None


def _bundle(config_map: dict[str, Any]) -> BundleAnswer:
    try:
        return msgspec.json.decode(config_map["data"][BUNDLE_KEY], type=BundleAnswer)
    except (KeyError, TypeError, msgspec.DecodeError) as error:
        raise NoAnswer(
            f"ConfigMap {BUNDLE_NAME} is not what a controller writes: {error}"
        ) from None
