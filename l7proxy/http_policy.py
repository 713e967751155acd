"""HTTP rules of policies: whether a request holds one of them, and what is mended in it.

What is looked at is the normalised head (l7proxy.normalise), which is also what the backend gets:
no spelling of a path or host reaches it that these rules have not judged. Expressions must match
the whole, in linear time. Knows rules and heads, no identities and no ports.

Source: CiliumNetworkPolicy toPorts[].rules.http (pkg/policy/api/http.go).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from l7proxy.field_rules import check_modifiable, check_name, check_value
from l7proxy.message import Headers, RequestHead
from l7proxy.route_compile import Regex
from mesh.model.policyconfig import HeaderRule, HttpRule


class Mend(NamedTuple):
    """What is done to a header that is not as a rule asks (headerMatches[].mismatch)."""

    action: Literal["ADD", "DELETE", "REPLACE"]
    name: bytes
    value: bytes

    def apply(self, headers: Headers) -> Headers:
        """The fields with it done; the list itself stays as it is."""
        field = (self.name, self.value)
        if self.action == "ADD":
            return [*headers, field]
        kept = [one for one in headers if one[0] != self.name]
        return kept if self.action == "DELETE" else [*kept, field]


class _Header(NamedTuple):
    name: bytes
    value: bytes | None
    otherwise: Literal["DENY", "LOG", "ADD", "DELETE", "REPLACE"]

    def holds(self, head: RequestHead) -> bool:
        if self.name == b"host":
            return self.value in (None, head.authority, head.host)
        values = [value for name, value in head.headers if name == self.name]
        if not values:
            return False
        return self.value is None or b",".join(values) == self.value


class CompiledHttp:
    """One rule. Refused: it is none."""

    __slots__ = ("_headers", "_host", "_method", "_path")

    def __init__(self, rule: HttpRule, where: str) -> None:
        self._method = _regex(rule.method, f"{where}.method")
        self._path = _regex(rule.path, f"{where}.path")
        self._host = _host(rule.host, f"{where}.host")
        self._headers = tuple(
            _header(one, f"{where}.headers[{i}]") for i, one in enumerate(rule.headers)
        )

    def judge(self, head: RequestHead) -> tuple[Mend, ...] | None:
        """What is to be mended in a request that holds the rule; None: it does not."""
        if self.mismatch(head):
            return None
        return tuple(
            Mend(one.otherwise, one.name, one.value or b"")
            for one in self._headers
            if one.otherwise != "DENY" and one.otherwise != "LOG" and not one.holds(head)
        )

    def mismatch(self, head: RequestHead) -> str:
        """The first thing that is not as the rule asks, in words; "": it holds."""
        if self._method is not None and not self._method.matches(head.method):
            return f"method {head.method.decode()} is not {self._method.source}"
        if self._path is not None and not self._path.matches(head.path):
            return f"path {head.path.decode()} is not {self._path.source}"
        if self._host is not None and not (
            self._host.matches(head.host) or self._host.matches(head.authority)
        ):
            return f"host {head.authority.decode()} is not {self._host.source}"
        for one in self._headers:
            if one.otherwise == "DENY" and not one.holds(head):
                value = f": {one.value.decode()}" if one.value is not None else ""
                return f"it has no header {one.name.decode()}{value}"
        return ""


def regex_size(source: str, where: str) -> int:
    """What an expression costs, in RE2's instructions. Refused: it is none, or too large."""
    return Regex(source, where).size


def _regex(source: str | None, where: str) -> Regex | None:
    return Regex(source, where) if source is not None else None


def _host(source: str | None, where: str) -> Regex | None:
    """Hosts have no case (RFC 9110 §4.2.3), and those of heads are in lower case."""
    if source is None:
        return None
    Regex(source, where)  # alone: what encloses it must not complete it
    return Regex(f"(?i:{source})", where)


def _header(rule: HeaderRule, where: str) -> _Header:
    mended = rule.on_mismatch in ("ADD", "DELETE", "REPLACE")
    name = (check_modifiable if mended else check_name)(rule.name, where)
    value = check_value(rule.value, where) if rule.value is not None else None
    return _Header(name, value, rule.on_mismatch)
