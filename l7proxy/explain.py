"""Where a request to a Gateway would go, and why not elsewhere, for `weft explain`.

Nothing is sent anywhere: the listener is selected as a worker does it, the rest is explain_rules'.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

import msgspec

from l7proxy import forwarding
from l7proxy.explain_rules import (
    Explanation,
    answer,
    attached_routes,
    candidates,
    head_of,
    settings_of,
)
from l7proxy.message import ProtocolError, RequestHead
from l7proxy.routing import PortIndex, RouteIndex
from l7proxy.streams import ConnectionInfo
from mesh.model.nodeconfig import Listener, PortSection, Section
from mesh.model.section import SectionKey

__all__ = ["Explanation", "explain"]


def explain(
    sections: Mapping[SectionKey, Section],
    *,
    method: str,
    scheme: str,
    host: str,
    port: int,
    path: str,
    headers: Sequence[tuple[str, str]],
    address: str | None = None,
) -> Explanation:
    """Explain one request. `host` is the authority as sent, port included if there is one; `path`
    includes the query; `address` tells Gateways on the same port apart. The client is taken to be
    on this host and, with TLS, to send `host` as SNI. The answer depends on the arguments alone."""
    settings = settings_of(sections)
    try:
        head = head_of(method, scheme, host, path, headers, settings)
    except ProtocolError as error:
        return Explanation(status=error.status, detail=error.detail)
    # As in a worker: what a client of this host would be believed. The identifier is random.
    identifier = [item for item in head.headers if item[0] == b"x-request-id"]
    client = ConnectionInfo(("127.0.0.1", 0), (address or "", port), tls=scheme == "https")
    trusted = forwarding.apply(head, client, settings).trusted
    head.headers = [item for item in head.headers if item[0] != b"x-request-id"]
    head.headers += identifier if trusted else []
    ports = [
        section
        for _, section in sorted(sections.items())
        if isinstance(section, PortSection)
        and section.port == port
        and section.protocol.lower() == scheme
        and (address is None or section.address in (address, "0.0.0.0", "::"))
    ]
    if not ports:
        where = f"port {port}" if address is None else f"{address} port {port}"
        return Explanation(
            detail=f"nothing listens on {where} for {scheme}; there is {_listening(sections)}"
        )
    routes, refused = attached_routes(
        sections, {listener.id for port in ports for listener in port.listeners}
    )
    answers = [_on_port(sections, section, routes, head) for section in ports]
    # Without an address, the first port that has most to say stands for all.
    best = max(answers, key=lambda answer: (bool(answer.route), bool(answer.listener)))
    others = [c for answer in answers if answer is not best for c in answer.candidates]
    return msgspec.structs.replace(best, candidates=(*refused, *best.candidates, *others))


def _listening(sections: Mapping[SectionKey, Section]) -> str:
    ports = [section for section in sections.values() if isinstance(section, PortSection)]
    found = sorted((port.port, port.protocol.lower(), port.address) for port in ports)
    return ", ".join(f"{scheme} on {at} port {port}" for port, scheme, at in found) or "no listener"


def _on_port(
    sections: Mapping[SectionKey, Section],
    port: PortSection,
    routes: RouteIndex,
    head: RequestHead,
) -> Explanation:
    listener = PortIndex(port).select(head.host, _sni(head.host))
    found = routes.match(listener.id, head) if listener is not None else None
    elsewhere = {one.id: _not_selected(one, listener, head) for one in port.listeners}
    base = Explanation(
        gateway=port.gateway,
        listener=listener.id if listener is not None else "",
        candidates=candidates(elsewhere, routes, head, found),
    )
    if found is not None:
        return answer(sections, found, head, port, base)
    missing = "no route matches"
    if listener is None:
        missing = f"no listener is for host {head.host.decode()}"
    return msgspec.structs.replace(base, status=404, detail=missing)


def _sni(host: bytes) -> str | None:
    """What a TLS client sends: no addresses (RFC 6066 §3)."""
    text = host.decode()
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return text
    return None


def _not_selected(listener: Listener, selected: Listener | None, head: RequestHead) -> str:
    """Why a listener does not get the request; "": it does."""
    if listener is selected:
        return ""
    own = f"its listener is for hostname {listener.hostname or '*'}"
    if selected is None:
        return f"{own}, host is {head.host.decode()}"
    return f"{own}; host {head.host.decode()} belongs to {selected.id}"
