"""Conditions of policies: whether they are enforced as they are written, and if not, why and what
is done meanwhile.

`Accepted`: everything in it is supported. `Programmed`: the data plane of this node has it.
Functions of the derivation; transition times are filled in at the rim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from mesh.model.ciliumnetworkpolicy import CiliumPolicyStatus
from mesh.model.derive import View
from mesh.model.meta import Condition, ObjectKey
from mesh.model.networkpolicy import NetworkPolicyStatus
from mesh.model.section import SectionKey, cidr_key, policy_key
from mesh.policy.peers import ranges
from mesh.policy.spec import PolicyKey, Rulebook

Status: TypeAlias = NetworkPolicyStatus | CiliumPolicyStatus

NO_MESH = (
    "there is no mesh on this node, so no policy is enforced; start Weft with --steer CGROUP"
    " (weft validate: with --mesh-address and --node)"
)
# Refused where no policy is enforced at all.
EVERY_POLICY: SectionKey = policy_key("", "*")


def status(mesh: bool) -> Callable[[View, PolicyKey], Status]:
    """`mesh`: there is one on this node."""

    def compute(view: View, key: PolicyKey) -> Status:
        generation: int | None = view.get("Policy", key).metadata.generation
        book: Rulebook = view.get("rulebooks", key)
        accepted = _condition("Accepted", generation, "Unsupported", _problems(book))
        why = NO_MESH if not mesh else _refused(view, key, book)
        programmed = _condition("Programmed", generation, "Refused", why)
        make = NetworkPolicyStatus if key.kind == "NetworkPolicy" else CiliumPolicyStatus
        return make(conditions=(accepted, programmed))

    return compute


def refused_sections(key: SectionKey, why: str) -> Iterator[str]:
    """Refused sections of policy (for an index)."""
    if key.startswith(("policy/", "cidr/")):
        yield ""


def _problems(book: Rulebook) -> str:
    if not book.problems:
        return ""
    sides = [
        name
        for name in ("ingress", "egress")
        if any(getattr(one, name).default_deny or getattr(one, name).rules for one in book.specs)
    ]
    closed = f"{' and '.join(sides)} of the pods that it selects is denied" if sides else ""
    meanwhile = (
        f"until that is mended, nothing of it is in force{', and ' if closed else ''}{closed}"
    )
    return "; ".join((*book.problems, meanwhile))


def _refused(view: View, key: PolicyKey, book: Rulebook) -> str:
    if any(view.get("resolved", (key, index)) is None for index in range(len(book.specs))):
        return "a defect in Weft, which its log has: everything is denied to whom it selects"
    refused: set[SectionKey] = set(view.bucket("refused_policies", ""))
    if not refused:
        return ""
    concerned = refused & {EVERY_POLICY}
    for index, spec in enumerate(book.specs):
        concerned |= refused & set(map(cidr_key, ranges((key, index), spec)))
        for identity in view.get("subjects", (key, index)) or ():
            pods: set[ObjectKey] = set(view.bucket("pods_of_identity", identity))
            concerned |= refused & {policy_key(*pod) for pod in pods}
    return "; ".join(
        view.get("refusals", one)
        if one == EVERY_POLICY
        else f"the data plane refused {one}: {view.get('refusals', one)}"
        for one in sorted(concerned)
    )


def _condition(type: str, generation: int | None, reason: str, why: str) -> Condition:
    status: Literal["True", "False"] = "False" if why else "True"
    return Condition(
        type=type,
        status=status,
        reason=reason if why else type,
        message=why,
        last_transition_time="",
        observed_generation=generation,
    )
