"""Which of several controllers works: leader election by a Lease.

Who holds the Lease renews it; who does not takes it once it has seen no renewal for as long as the
Lease says, by its own clock (so clocks may differ), and hands it back when it ends. Source:
https://kubernetes.io/docs/concepts/architecture/leases/, client-go's leaderelection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mesh.sources.kubernetes_client import Client, ServerError

_log = logging.getLogger("weft.controller")

NAME = "weft-controller"


class Election:
    """`run` until cancelled; `changed(leading)` when that changes. Not leading any more is told
    before anybody else may lead: `renew_s` without a renewal, which is less than `lease_s`."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        identity: str,
        changed: Callable[[bool], None],
        *,
        lease_s: float = 15.0,
        renew_s: float = 10.0,
        retry_s: float = 2.0,
    ) -> None:
        self.leading = False
        self.holder = ""
        self._client = client
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace = namespace
        self._identity = identity
        self._changed = changed
        self._lease_s = lease_s
        self._renew_s = renew_s
        self._retry_s = retry_s
        self._loop = asyncio.get_running_loop()
        self._renewed_at = 0.0
        # What was seen of somebody else's Lease, and since when it has not changed.
        self._seen: tuple[str, float] = ("", 0.0)

    async def run(self) -> None:
        try:
            while True:
                try:
                    async with asyncio.timeout_at(self._until()):
                        held = await self._attempt()
                except (ServerError, TimeoutError) as error:
                    held = self.leading
                    _log.warning("the Lease %s cannot be written: %s", NAME, error)
                now = self._loop.time()
                self._set(held and now - self._renewed_at < self._renew_s)
                await asyncio.sleep(min(self._retry_s, self._until() - now))
        finally:
            await self._hand_back()

    def _until(self) -> float:
        """When an attempt that begins now is given up: while leading, by when the Lease has to have
        been renewed, from the beginning of the attempt that renewed it last."""
        since = self._renewed_at if self.leading else self._loop.time()
        return since + self._renew_s

    def _set(self, leading: bool) -> None:
        if leading != self.leading:
            self.leading = leading
            _log.info("%s", "leading" if leading else f"not leading; {self.holder or 'nobody'} is")
            self._changed(leading)

    async def _attempt(self) -> bool:
        """Take or renew the Lease; whether this is the holder."""
        started = self._loop.time()
        lease = await self._get()
        if lease is None:
            body = self._lease({"leaseTransitions": 0}, {})
            try:
                await self._client.request("POST", self._path, {}, body)
            except ServerError as error:
                if error.status == 409:
                    return False
                raise
        else:
            spec = lease.get("spec") or {}
            self.holder = spec.get("holderIdentity") or ""
            if self.holder not in ("", self._identity) and not self._stale(lease):
                return False
            try:
                await self._put(lease, spec)
            except ServerError as error:
                if error.status == 409:
                    # Somebody else was faster.
                    return False
                raise
        self.holder = self._identity
        self._renewed_at = started
        return True

    def _stale(self, lease: dict[str, Any]) -> bool:
        version, now = lease["metadata"]["resourceVersion"], self._loop.time()
        if self._seen[0] != version:
            self._seen = (version, now)
        duration = float(lease["spec"].get("leaseDurationSeconds") or self._lease_s)
        return now - self._seen[1] > duration

    async def _get(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = await self._client.request("GET", f"{self._path}/{NAME}")
        except ServerError as error:
            if error.status == 404 and error.reason == "NotFound":
                return None
            raise
        return found

    async def _put(self, lease: dict[str, Any], spec: dict[str, Any]) -> None:
        body = self._lease(spec, lease["metadata"])
        await self._client.request("PUT", f"{self._path}/{NAME}", {}, body)

    def _lease(self, spec: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        new = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._lease_s)),
            "acquireTime": spec.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": spec.get("leaseTransitions") or 0,
        }
        if spec.get("holderIdentity") != self._identity:
            new["acquireTime"] = now
            new["leaseTransitions"] += bool(metadata)
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {**metadata, "name": NAME, "namespace": self._namespace},
            "spec": new,
        }

    async def _hand_back(self) -> None:
        """Give the Lease away at once, so that the next need not wait until it is stale."""
        if not self.leading:
            return
        self._set(False)
        try:
            async with asyncio.timeout(2.0):
                lease = await self._get()
                spec = (lease or {}).get("spec") or {}
                if spec.get("holderIdentity") == self._identity:
                    spec["holderIdentity"] = ""
                    spec["leaseDurationSeconds"] = 1
                    await self._client.request("PUT", f"{self._path}/{NAME}", {}, lease)
        except (ServerError, TimeoutError) as error:
            _log.warning("the Lease %s could not be handed back: %s", NAME, error)
