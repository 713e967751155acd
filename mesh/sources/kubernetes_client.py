"""A connection to a Kubernetes API server: credentials, requests, streams of lines.

Where the server is and how to be let in is the official client's to know (`kubernetes.aio`:
kubeconfig, in-cluster, exec plugins, TLS). Its generated models are not used: objects become ours
without a detour, and lists of thousands do not pass through two sets of classes. Its asyncio half
rather than threads: a node has some fifteen watches open, and their events belong to one loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

MANAGER = "weft"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
_REQUEST_S = 30.0
_CONNECT_S = 10.0
# Servers send a bookmark about every minute; a stream that is silent for so long is taken for dead,
# and resumed where it stood.
_SILENCE_S = 150.0
_CONNECTIONS = 100
# Kinds of answers that are kept nowhere: success, discovery, access reviews.
_UNVERSIONED = ("Status", "APIResourceList", "Review")


class SourceError(Exception):
    """There is no way to a cluster; what is missing and what to do."""


class ServerError(Exception):
    """The server did not do what was asked. `status` is HTTP's, 0 where there was no answer;
    `retry_after_s` is what the server asks for, or None."""

    def __init__(
        self, status: int, reason: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class Backoff:
    """How long to wait before the next attempt: twice as long each time, at most `most_s`, with
    jitter, so that many nodes do not come back at once."""

    def __init__(self, first_s: float = 0.2, most_s: float = 30.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def reset(self) -> None:
        self._next_s = self._first_s

    async def wait(
        self, at_least_s: float | None = None, *, until: asyncio.Event | None = None
    ) -> None:
        """`until` ends it early, unless it is set already."""
        pause = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, self._most_s)
        pause = max(pause, min(at_least_s or 0.0, self._most_s))
        if until is None or until.is_set():
            await asyncio.sleep(pause)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await until.wait()


class Client:
    """Requests to one API server. `kubeconfig` None: that of the environment ($KUBECONFIG,
    ~/.kube/config), or the service account of the pod that this runs in."""

    def __init__(self, kubeconfig: Path | None) -> None:
        # Whether the server answered last: who waits for it need not wait longer than the first.
        self.reachable = asyncio.Event()
        self._kubeconfig = kubeconfig
        self._configuration = Configuration()
        self._api: ApiClient | None = None

    @property
    def url(self) -> str:
        return str(self._configuration.host)

    async def open(self) -> None:
        """Read the credentials, again if need be. SourceError: there are none that can be used."""
        configuration = Configuration()
        configuration.connection_pool_maxsize = _CONNECTIONS
        # Who asks knows better when to try again.
        configuration.retries = None
        try:
            if self._kubeconfig is None and _in_cluster():
                load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                await load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=str(self._kubeconfig) if self._kubeconfig else None,
                    client_configuration=configuration,
                    persist_config=False,
                )
        except (ConfigException, OSError, ValueError, TypeError, AttributeError) as error:
            where = self._kubeconfig or "no kubeconfig, and not in a pod"
            raise SourceError(
                f"{where}: no usable way to a cluster: {error}: give --kubeconfig FILE, one that "
                "kubectl can use"
            ) from None
        if self._api is not None and _same_but_token(configuration, self._configuration):
            # Streams that are open stay so.
            self._configuration.api_key = configuration.api_key
            return
        before, self._api = self._api, ApiClient(configuration)
        self._configuration = configuration
        self._api.user_agent = f"{MANAGER}/1"
        if before is not None:
            await before.close()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        if self._api is not None:
            await self._api.close()  # type: ignore[no-untyped-call]
            self._api = None

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int] = {},
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """The answer's body, decoded: an object. ServerError: not a success, or nothing that an API
        server says."""
        # A long answer may come slowly, as long as it comes.
        limits = aiohttp.ClientTimeout(None, connect=_REQUEST_S, sock_read=_REQUEST_S)
        response = await self._send(method, path, query, body, content_type, accept, limits)
        async with _translated(), response:
            data = await response.read()
        await self._check(response, data)
        try:
            found = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise bad_answer(f"{method} {path}", f"not JSON: {error}") from None
        if path != "/version" and not _is_answer(found):
            raise bad_answer(f"{method} {path}", "no object of Kubernetes")
        return found

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str | int], *, accept: str = "application/json"
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """The lines of an answer as they come, whole ones only, however long. ServerError: it does
        not begin, or breaks."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        response = await self._send("GET", path, query, None, "application/json", accept, timeout)
        async with _translated(), response:
            if response.status >= 300:
                await self._check(response, await response.read())
            yield _lines(response.content)

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: Any,
        content_type: str,
        accept: str,
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        api = self._api
        if api is None:
            raise ServerError(0, "Unreachable", "no credentials have been read yet")
        async with _translated():
            method, url, headers, body, _ = await api.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params={"Accept": accept, "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            try:
                answer = await api.call_api(method, url, headers, body, _request_timeout=limits)
            except (aiohttp.ClientError, OSError, TimeoutError):
                self.reachable.clear()
                raise
        self.reachable.set()
        response: aiohttp.ClientResponse = answer.response
        return response

    async def _check(self, response: aiohttp.ClientResponse, data: bytes) -> None:
        if response.status < 300:
            return
        if response.status == 401:
            # The token may have been renewed: where it comes from is asked again.
            with contextlib.suppress(SourceError):
                await self.open()
        raise _refusal(response, data)


def _is_answer(found: object) -> bool:
    """api-conventions, "Types" and "Metadata": everything says what it is, and objects and lists
    of what version they are."""
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        return False
    metadata = found.get("metadata")
    return found["kind"].endswith(_UNVERSIONED) or (
        isinstance(metadata, dict) and isinstance(metadata.get("resourceVersion"), str)
    )


def bad_answer(what: str, why: str) -> ServerError:
    """Somebody else answers in the server's place, such as a proxy, or only a part came."""
    return ServerError(0, "BadAnswer", f"{what}: {why}")


def object_path(api_version: str, plural: str, metadata: Mapping[str, Any]) -> str:
    """Where an object is on a server. `metadata`: name, and namespace or none."""
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    namespace = metadata.get("namespace")
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{where}/{plural}/{metadata['name']}"


def _in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ


def _same_but_token(a: Configuration, b: Configuration) -> bool:
    names = ("host", "ssl_ca_cert", "cert_file", "key_file", "verify_ssl", "proxy")
    return all(getattr(a, name) == getattr(b, name) for name in names)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    rest = bytearray()
    async for chunk in content.iter_any():
        rest += chunk
        if b"\n" in chunk:
            *whole, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            for line in whole:
                if line:
                    yield line


def _refusal(response: aiohttp.ClientResponse, data: bytes) -> ServerError:
    """The answer's metav1.Status, or what else it says."""
    try:
        status = msgspec.json.decode(data)
        reason, message = status.get("reason", ""), status.get("message", "")
    except (msgspec.DecodeError, AttributeError):
        reason, message = "", data[:200].decode(errors="replace")
    after = response.headers.get("Retry-After", "")
    message = message or response.reason or ""
    text = f"{response.method} {response.url.path}: {response.status} {message}"
    return ServerError(response.status, reason, text, float(after) if after.isdigit() else None)


class _translated:
    """Everything that can go wrong on a connection, as a ServerError."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (aiohttp.ClientError, OSError, TimeoutError)):
            why = str(error) or type(error).__name__
            raise ServerError(0, "Unreachable", why) from None
