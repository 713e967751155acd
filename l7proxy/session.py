"""Session persistence by cookie or header (Gateway API SessionPersistence, GEP-1619).

The session's value is stateless, so it holds over workers and restarts: endpoint, time of issue and
of last use in URL-safe base64. It is opaque to clients but not signed: a forged value can do no
more than choose among the endpoints of the rule's own backends (the exchange looks it up there) or
outstay a timeout, which is no boundary of security. Toward the backend the request's own cookie or
header is kept. No I/O, no clock: `now` is Unix time in seconds.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from l7proxy.field_rules import Refused, check_modifiable, check_name
from l7proxy.message import RequestHead
from mesh.model.routeconfig import SessionPersistence

_MAX_VALUE = 512
# How far a value's clock may be ahead of ours: another node's proxy may have issued it.
_CLOCK_SKEW_S = 300


@dataclass(frozen=True, slots=True)
class CompiledSession:
    """A rule's sessions. `name` is lower case for headers, as written for cookies."""

    cookie: bool
    name: bytes
    absolute_s: float | None
    idle_s: float | None
    permanent: bool
    path: bytes


@dataclass(frozen=True, slots=True)
class _Session:
    endpoint: str
    issued: int
    used: int


def compile_session(session: SessionPersistence, where: str) -> CompiledSession:
    cookie = session.type == "Cookie"
    if session.permanent and session.absolute_timeout_s is None:
        raise Refused(f"{where}: a Permanent cookie needs an absoluteTimeout")
    if not session.path.isascii() or not session.path.isprintable() or ";" in session.path:
        raise Refused(f"{where}: {session.path!r} cannot be a cookie's path")
    if cookie:
        check_name(session.name, f"{where}.sessionName")
        name = session.name.encode()
    else:
        name = check_modifiable(session.name, f"{where}.sessionName")
    return CompiledSession(
        cookie=cookie,
        name=name,
        absolute_s=session.absolute_timeout_s,
        idle_s=session.idle_timeout_s,
        permanent=session.permanent,
        path=session.path.encode(),
    )


def endpoint_for(head: RequestHead, session: CompiledSession, now: float) -> str | None:
    """The id of the endpoint that the request's session asks for; None without a valid session.
    The caller must check that the endpoint is one of the rule's."""
    found = _find(head, session, now)
    return found.endpoint if found is not None else None


def response_header(
    session: CompiledSession, endpoint_id: str, now: float, *, secure: bool, request: RequestHead
) -> tuple[bytes, bytes] | None:
    """The response's header field that starts or prolongs the session, None if the client has all
    it needs. `request` is the client's head; `secure`: the client's connection is TLS.

    Another endpoint than the session's begins a new session. The absolute timeout runs from the
    first response; with an idle timeout every response tells the time of use anew.
    """
    known = _find(request, session, now)
    issued = int(now)
    if known is not None and known.endpoint == endpoint_id:
        if session.idle_s is None:
            return None
        issued = known.issued
    value = _encode(_Session(endpoint_id, issued, int(now)))
    if not session.cookie:
        return session.name, value
    cookie = b"%s=%s; Path=%s; HttpOnly; SameSite=Lax" % (session.name, value, session.path)
    if secure:
        cookie += b"; Secure"
    if session.permanent and session.absolute_s is not None:
        cookie += b"; Max-Age=%d" % max(0, int(issued + session.absolute_s - now))
    return b"set-cookie", cookie


def _find(head: RequestHead, session: CompiledSession, now: float) -> _Session | None:
    if session.cookie:
        values = [
            value.strip(b'" \t')
            for field, line in head.headers
            if field == b"cookie"
            for name, _, value in (pair.partition(b"=") for pair in line.split(b";"))
            if name.strip(b" \t") == session.name
        ]
    else:
        values = [value for field, value in head.headers if field == session.name]
    for value in values:
        found = _decode(value)
        if found is not None and _valid(found, session, now):
            return found
    return None


def _valid(found: _Session, session: CompiledSession, now: float) -> bool:
    if not found.issued <= found.used <= now + _CLOCK_SKEW_S:
        return False
    if session.absolute_s is not None and now >= found.issued + session.absolute_s:
        return False
    return session.idle_s is None or now < found.used + session.idle_s


def _encode(session: _Session) -> bytes:
    text = f"{session.issued:x}.{session.used - session.issued:x}.{session.endpoint}"
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=")


def _decode(value: bytes) -> _Session | None:
    if len(value) > _MAX_VALUE:
        return None
    try:
        padded = value + b"=" * (-len(value) % 4)
        text = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
        issued, age, endpoint = text.split(".", 2)
        start = int(issued, 16)
        return _Session(endpoint, start, start + int(age, 16)) if endpoint else None
    except (binascii.Error, ValueError):
        return None
