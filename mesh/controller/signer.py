"""The signer weft.dev/workload: CertificateSigningRequests of agents for identities of their nodes.

Who asks is what the API server wrote into the request: the agents' service account, and the pod
that its token is bound to, whose node is the node that asks. What it may have is what pods on that
node run as. Everything else is denied, with a reason. Source:
https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/,
https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/ (bound tokens).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from certs.errors import IssueRefused
from mesh.authority.pods import Placement
from mesh.controller.authority import ClusterAuthority
from mesh.model.decode import Object
from mesh.model.meta import ObjectKey
from mesh.model.nodereport import AGENT_ACCOUNT, SIGNER
from mesh.model.pod import Pod
from mesh.sources.kubernetes_client import MERGE, Backoff, Client, ServerError

_log = logging.getLogger("weft.controller")

PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
QUERY = {"fieldSelector": f"spec.signerName={SIGNER}"}
_USAGES = frozenset(("digital signature", "client auth", "server auth"))
_AGAIN_S = 2.0
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_NODE_NAME = "authentication.kubernetes.io/node-name"


class Signer:
    """A sink for the requests' reflector. `get(kind, key)`: an object as it is in force."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        authority: ClusterAuthority,
        placement: Placement,
        get: Callable[[str, ObjectKey], Object | None],
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._authority = authority
        self._placement = placement
        self._get = get
        self._open: dict[str, dict[str, Any]] = {}
        self._wake = asyncio.Event()

    # --- what the reflector tells ----------------------------------------------------------------

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        has_one = (raw.get("status") or {}).get("certificate")
        if has_one or _decided(raw) & {"Denied", "Failed"}:
            self._open.pop(key.name, None)
            return
        if raw["spec"]["signerName"] == SIGNER:
            self._open[key.name] = raw
            self._wake.set()

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        self._open.pop(key.name, None)

    def reached(self, version: str) -> None:
        pass

    def failing(self, why: ServerError | None) -> None:
        if why is not None:
            _log.warning("CertificateSigningRequests cannot be followed: %s", why)

    # --- the work --------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: answer what is open, while there is an authority."""
        backoff = Backoff()
        while True:
            await self._wake.wait()
            await self._authority.ready.wait()
            self._wake.clear()
            for name, raw in list(self._open.items()):
                if not self._authority.ready.is_set():
                    # It writes down what it has done; nobody else reminds of those that are left.
                    self._wake.set()
                    break
                try:
                    await self._answer(name, raw)
                except ServerError as error:
                    if error.status == 500:
                        # Perhaps of this one alone: others go on.
                        _log.warning("request %s: %s; trying again", name, error)
                        asyncio.get_running_loop().call_later(_AGAIN_S, self._wake.set)
                        continue
                    if error.status not in (400, 404, 409, 422):
                        _log.warning("request %s: %s; trying again", name, error)
                        self._wake.set()
                        await backoff.wait(error.retry_after_s)
                        break
                    # Gone, or changed: it comes again as it is now, if it has not yet. Or nothing
                    # that can be written into it, whatever comes: others go on.
                    if error.status in (400, 422):
                        _log.error("request %s: %s; it is left as it is", name, error)
                    if self._open.get(name) is raw:
                        del self._open[name]
                backoff.reset()

    async def _answer(self, name: str, raw: dict[str, Any]) -> None:
        try:
            node = self._requester(raw)
            request = base64.b64decode(raw["spec"]["request"], validate=True).decode("ascii")
            issued = self._authority.sign(request, self._placement.allowed(node))
        except (binascii.Error, UnicodeDecodeError):
            await self._refuse(name, raw, "malformed", "spec.request is not base64 of PEM")
            return
        except IssueRefused as error:
            await self._refuse(name, raw, error.reason, error.why)
            return
        if "Approved" not in _decided(raw):
            why = f"{issued.spiffe_id} runs on node {node}"
            raw = await self._decide(name, raw, "approval", "Approved", "OnItsNode", why)
        certificate = base64.b64encode(issued.chain_pem.encode()).decode()
        await self._write(name, raw, "status", {"certificate": certificate})
        self._open.pop(name, None)
        _log.info("issued %s to node %s", issued.spiffe_id, node)

    async def _refuse(self, name: str, raw: dict[str, Any], reason: str, why: str) -> None:
        """Denied; Failed, if somebody has approved it: the leader before this one, when it still
        was right, or a person. It cannot be both approved and denied ("Request approval")."""
        _log.warning("request %s is refused: %s: %s", name, reason, why)
        if "Approved" in _decided(raw):
            await self._decide(name, raw, "status", "Failed", reason, why)
        else:
            await self._decide(name, raw, "approval", "Denied", reason, why)
        self._open.pop(name, None)

    def _requester(self, raw: dict[str, Any]) -> str:
        """The node that asks. IssueRefused: nobody who may."""
        spec = raw["spec"]
        account = f"system:serviceaccount:{self._namespace}:{AGENT_ACCOUNT}"
        if spec.get("username") != account:
            why = f"{spec.get('username')} asks, and only {account} may"
            raise IssueRefused("not_on_this_node", why)
        if not set(spec.get("usages") or ()) <= _USAGES:
            why = f"usages {', '.join(spec['usages'])}: only {', '.join(sorted(_USAGES))}"
            raise IssueRefused("malformed", why)
        extra = spec.get("extra") or {}
        name, uid, node = (
            next(iter(extra.get(key) or ("",))) for key in (_POD_NAME, _POD_UID, _NODE_NAME)
        )
        pod = self._get("Pod", ObjectKey(self._namespace, name))
        if not isinstance(pod, Pod) or pod.metadata.uid != uid or not pod.spec.node_name:
            why = f"the token is not bound to a pod that runs: {name or 'no pod'}"
            raise IssueRefused("not_on_this_node", why)
        if node and node != pod.spec.node_name:
            why = f"the token is of node {node}, its pod {name} of node {pod.spec.node_name}"
            raise IssueRefused("not_on_this_node", why)
        return pod.spec.node_name

    async def _decide(
        self, name: str, raw: dict[str, Any], endpoint: str, decision: str, reason: str, why: str
    ) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {
            "type": decision,
            "status": "True",
            "reason": reason,
            "message": why,
            "lastUpdateTime": now,
            "lastTransitionTime": now,
        }
        before = (raw.get("status") or {}).get("conditions") or ()
        return await self._write(name, raw, endpoint, {"conditions": [*before, condition]})

    async def _write(
        self, name: str, raw: dict[str, Any], endpoint: str, status: dict[str, Any]
    ) -> dict[str, Any]:
        """ServerError 409: it is another than it was."""
        body = {
            "metadata": {"resourceVersion": raw["metadata"]["resourceVersion"]},
            "status": status,
        }
        written: dict[str, Any] = await self._client.request(
            "PATCH", f"{PATH}/{name}/{endpoint}", {}, body, content_type=MERGE
        )
        return written


def _decided(raw: dict[str, Any]) -> set[str]:
    return {one["type"] for one in (raw.get("status") or {}).get("conditions") or ()}
