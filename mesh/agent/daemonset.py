"""Whether the cluster still wants this agent to be its node's CNI plugin.

Followed all the time, since at the end there may be no right left to ask with: the DaemonSet goes
first, the roles at once after it. An upgrade ends this agent as well, but the DaemonSet stays.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from mesh.model.meta import ObjectKey
from mesh.sources.kubernetes_client import Client, ServerError
from mesh.sources.kubernetes_watch import Reflector

NAME = "weft-agent"
_OPTION = "--cni-conf-dir"


class DaemonSet:
    """`unwanted`: there was one, and none is left that has the option of the CNI plugin. While the
    cluster cannot be asked, nothing changes."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.unwanted = asyncio.Event()
        path = f"/apis/apps/v1/namespaces/{namespace}/daemonsets"
        query = {"fieldSelector": f"metadata.name={NAME}"}
        self._reflector = Reflector(client, path, self, query=query)

    async def run(self) -> None:
        """For ever."""
        with contextlib.suppress(ServerError):  # a server without DaemonSets has not started us
            await self._reflector.run()

    # --- what the reflector tells (Sink) ----------------------------------------------------------

    def changed(self, _key: ObjectKey, raw: dict[str, Any]) -> None:
        pod = raw.get("spec", {}).get("template", {}).get("spec", {})
        words = (word for one in pod.get("containers", ()) for word in one.get("args") or ())
        installs = any(word.startswith(_OPTION) for word in words)
        if installs and "deletionTimestamp" not in raw["metadata"]:
            self.unwanted.clear()
        else:
            self.unwanted.set()

    def gone(self, _key: ObjectKey, _uid: str, _version: str) -> None:
        self.unwanted.set()

    def reached(self, version: str) -> None:
        pass

    def failing(self, why: ServerError | None) -> None:
        pass
