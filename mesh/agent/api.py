"""The agent API: HTTP and JSON on a unix socket that only the agent's user can open.

What commands show comes from here. It reads the node, changes nothing, and shows no private keys.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
from aiohttp import web

from l7proxy.explain_automaton import describe
from mesh.agent import flow_stream, metrics, policies, svid_status
from mesh.agent.admin import Admin
from mesh.agent.datapath import Datapath
from mesh.agent.flow_filter import FilterError
from mesh.agent.node import Node
from mesh.agent.options import AgentOptions
from mesh.agent.rundir import RunDir
from mesh.agent.target import (
    TargetError,
    explained,
    parse_client,
    parse_service,
    parse_target,
)
from mesh.agent.unmet import warnings
from mesh.model.decode import Object, encode
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import CertificateSection, Section, SvidSection
from mesh.policy.explain import QuestionError
from mesh.sources.documents import Problem

_SHUTDOWN_S = 1.0

Origin: TypeAlias = Callable[[str, ObjectKey], tuple[str, int]]


class Api:
    """The server."""

    def __init__(
        self, node: Node, options: AgentOptions, run_dir: RunDir, admin: Admin, origin: Origin
    ) -> None:
        self._node = node
        self._options = options
        self._run_dir = run_dir
        self._admin = admin
        self._origin = origin
        self._cluster = None
        if options.manifests is None:
            self._cluster = str(options.kubeconfig or "of this pod, or of $KUBECONFIG")
        self._started = time.time()
        app = web.Application()
        app.router.add_get("/objects", self._objects)
        app.router.add_get("/status", self._status)
        app.router.add_get("/problems", self._problems)
        app.router.add_get("/explain", self._explain)
        app.router.add_get("/bpf/automaton", self._automaton)
        app.router.add_get("/certs", self._certs)
        app.router.add_get("/policies", self._policies)
        app.router.add_get("/policy/explain", self._policy_explain)
        app.router.add_get("/config", self._config)
        app.router.add_get("/metrics-json", self._metrics)
        app.router.add_get("/flows", self._flows)
        # Handlers of readers that have gone end at once; others get a moment when the agent ends.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S
        )

    async def start(self) -> None:
        """Listen. A socket that an agent before this one left is replaced."""
        await self._runner.setup()
        path = self._run_dir.api_socket
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, str(path)).start()
        finally:
            os.umask(mask)

    async def close(self) -> None:
        self._node.flows.close()
        await self._runner.cleanup()

    async def _objects(self, request: web.Request) -> web.Response:
        """?kind= (required), &namespace=, &name=."""
        kind = request.query.get("kind", "")
        namespace, name = request.query.get("namespace"), request.query.get("name")
        objects = self._node.objects.get(kind, {})
        found = [
            (obj, self._node.statuses.get(kind, key))
            for key, obj in sorted(objects.items())
            if (namespace is None or key.namespace == namespace)
            and (name is None or key.name == name)
        ]
        # Thousands of objects take a while, and configurations need not wait for that.
        items = await asyncio.to_thread(lambda: [with_status(*one) for one in found])
        return _json({"items": items})

    async def _status(self, _request: web.Request) -> web.Response:
        node = self._node
        config = node.rollout.config
        bound = node.bound
        not_ready, degraded = node.not_ready(), node.degraded()
        if self._admin.error:
            degraded.append(self._admin.error)
        if full := self._run_dir.full():
            degraded.append(full)
        if not node.synced:
            degraded += [problem.message for problem in node.problems]
        address = self._admin.address
        now = await asyncio.to_thread(metrics.workers_now, self._run_dir.metrics)
        tunnels = None
        if node.svids is not None:
            tunnels = {
                "out": now.tunnels_out,
                "in": now.tunnels_in,
                "outliving": now.tunnels_outliving,
            }
        return _json(
            {
                "agent": {"pid": os.getpid(), "started": self._started},
                "manifests": str(self._options.manifests) if self._options.manifests else None,
                "cluster": self._cluster,
                "runDir": str(self._run_dir.path),
                "admin": f"{_host(address[0])}:{address[1]}"
                if address and not self._admin.error
                else None,
                "ready": not not_ready,
                **_steered(node.datapath),
                "kernelRules": node.automata.rules() if node.automata is not None else None,
                "pairSeriesFull": now.series_full,
                "notInKernel": node.datapath.through if node.datapath is not None else None,
                "notReady": not_ready,
                "degraded": degraded,
                "config": {
                    "version": config.version,
                    "sections": dict(Counter(key.partition("/")[0] for key in config.sections)),
                },
                "expectedWorkers": node.rollout.expected,
                "workers": [worker._asdict() for worker in node.rollout.workers],
                "ports": [
                    *(
                        {"address": port.address, "port": port.port, "bound": True, "why": ""}
                        for port in (bound.bound if bound else ())
                    ),
                    *(
                        {"address": port.address, "port": port.port, "bound": False, "why": why}
                        for port, why in (bound.failed if bound else ())
                    ),
                ],
                "objects": dict(node.object_counts()),
                "flows": {
                    "seen": node.flows.seen,
                    "lost": node.flows.lost,
                    "overwritten": node.flows.overwritten,
                    "capacity": node.flows.capacity,
                },
                "datapath": {reason.name: count for reason, count in node.kernel.counters().items()}
                if node.kernel is not None
                else None,
                "tunnels": tunnels,
                "svids": svid_status.identities(node.svids) if node.svids is not None else None,
                "problems": dict(Counter(problem.level for problem in self._all_problems())),
            }
        )

    async def _problems(self, _request: web.Request) -> web.Response:
        return _json({"items": [problem._asdict() for problem in self._all_problems()]})

    def _all_problems(self) -> list[Problem]:
        """What is wrong in the files, and what of them is not in force as meant."""
        node = self._node
        told = [(ident, why) for ident, found in node.told.items() for why in found]
        told += node.statuses.unmet.items()
        return sorted([*node.problems, *warnings(node.objects, told, self._origin)])

    async def _explain(self, request: web.Request) -> web.Response:
        """?method=&url=&header=NAME:VALUE (several)&address=&from=NAMESPACE/POD."""
        query = request.query
        try:
            target = parse_target(
                query.get("method", "GET"), query.get("url", ""), query.getall("header", [])
            )
            client = parse_client(query["from"]) if "from" in query else None
        except TargetError as error:
            return _json({"error": str(error)}, status=400)
        sections = self._node.rollout.config.sections
        found = await asyncio.to_thread(
            explained, sections, target, address=query.get("address"), client=client
        )
        return _json(msgspec.to_builtins(found))

    async def _automaton(self, request: web.Request) -> web.Response:
        """?service=NAMESPACE/NAME:PORT."""
        try:
            service = parse_service(request.query.get("service", ""))
        except TargetError as error:
            return _json({"error": str(error)}, status=400)
        sections = self._node.rollout.config.sections
        found = await asyncio.to_thread(describe, sections, *service)
        automata = self._node.automata
        in_force = {f"{one:016x}" for one in automata.in_force} if automata is not None else set()
        refused = automata.refused if automata is not None else {}
        why = {f"{number:016x}": text for number, text in refused.items()}
        return _json(
            {
                "items": [
                    {
                        **msgspec.to_builtins(one),
                        "in_force": one.generation in in_force,
                        "refused": why.get(one.generation, ""),
                    }
                    for one in found
                ]
            }
        )

    async def _certs(self, _request: web.Request) -> web.Response:
        svids = self._node.svids
        if svids is None:
            return _json({"authority": False, "identities": [], "bundles": []})
        return _json(svid_status.details(svids))

    async def _policies(self, _request: web.Request) -> web.Response:
        items = [
            {
                **msgspec.to_builtins(row),
                "unmet": self._node.statuses.unmet.get(
                    (row.kind, ObjectKey(row.namespace, row.name)), ""
                ),
            }
            for row in self._node.policies()
        ]
        return _json({"items": items})

    async def _policy_explain(self, request: web.Request) -> web.Response:
        """?from=&to=&port=&protocol=&method=&path=&header=NAME:VALUE (several)."""
        try:
            question = policies.parse(request.query, request.query.getall("header", []))
            node = self._node
            sections_of = policies.Sections(
                node.rollout.config.sections, self._options.plane, dict(node.objects)
            )
            found = await asyncio.to_thread(policies.explained, question, sections_of, self._origin)
        except QuestionError as error:
            return _json({"error": str(error)}, status=400)
        return _json(msgspec.to_builtins(found))

    async def _config(self, _request: web.Request) -> web.Response:
        config = self._node.rollout.config
        sections = {key: redacted(section) for key, section in sorted(config.sections.items())}
        return _json({"version": config.version, "sections": sections})

    async def _metrics(self, _request: web.Request) -> web.Response:
        found = await asyncio.to_thread(metrics.samples, self._node, self._run_dir.metrics)
        return _json({"items": found})

    async def _flows(self, request: web.Request) -> web.StreamResponse:
        """See mesh.agent.flow_stream."""
        try:
            return await flow_stream.stream(request, self._node.flows)
        except FilterError as error:
            return _json({"error": str(error)}, status=400)


def with_status(obj: Object, status: Any) -> dict[str, Any]:
    """The object as plain data, as users wrote it, and the status that Weft gives it."""
    result = encode(obj)
    if status is not None:
        result["status"] = encode(status)
    return result


def redacted(section: Section) -> Any:
    """A section as plain data, without private keys."""
    if isinstance(section, CertificateSection | SvidSection):
        section = msgspec.structs.replace(section, key_pem="<redacted>")
    return msgspec.to_builtins(section)


def _steered(datapath: Datapath | None) -> dict[str, str | None]:
    """`steered`: the cgroup whose workloads this agent steers, if any; `notSteered`: why it does
    not, where it was asked to."""
    if datapath is None:
        return {"steered": None, "notSteered": None}
    why_not = "it is being tested and loaded" if datapath.loading else datapath.why_not
    if why_not is None:
        return {"steered": str(datapath.cgroup), "notSteered": None}
    how = "only as an earlier Weft left it" if datapath.left else "no"
    return {"steered": None, "notSteered": f"{how}: {why_not}"}


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _json(value: Any, *, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")
