"""Questions about policy as somebody asks them, and what they are answered from: the configuration
in force for this node, and what would be in force on others by the same objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import msgspec

from gateway.control import ControlPlane, Options
from l7proxy.policy_rules import Transport
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Section
from mesh.model.section import SectionKey
from mesh.policy.explain import Answer, Question, QuestionError, SideAnswer, explain
from mesh.policy.spec import KINDS


class Sections:
    """The sections of nodes by name: `own` those of the one with `options`, others derived from
    `objects` when they are asked for. `own` None: that one's are derived too."""

    def __init__(
        self,
        own: Mapping[SectionKey, Section] | None,
        options: Options,
        objects: Mapping[str, Mapping[ObjectKey, Any]],
    ) -> None:
        self.node = options.node
        self._options = options
        self._objects = objects
        self._known = {} if own is None else {options.node: own}

    def __call__(self, node: str) -> Mapping[SectionKey, Section]:
        if node not in self._known:
            options = msgspec.structs.replace(self._options, node=node)
            self._known[node] = ControlPlane(options).apply(self._objects).put
        return self._known[node]


def parse(query: Mapping[str, str], headers: Sequence[str]) -> Question:
    """QuestionError: it is none."""
    source, destination = query.get("from", ""), query.get("to", "")
    if not source or not destination:
        raise QuestionError("name both ends: --from POD --to POD")
    protocol = query.get("protocol", "TCP")
    if protocol not in get_args(Transport):
        raise QuestionError(f"{protocol}: not one of {', '.join(get_args(Transport))}")
    text = query.get("port", "")
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise QuestionError(f"port {text!r}: give a number, 0 to 65535")
    fields = []
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise QuestionError(f"-H {header!r}: not 'name: value'")
        fields.append((name.strip(), value.strip()))
    method = query.get("method")
    if method is not None and protocol != "TCP":
        raise QuestionError(f"requests go over TCP, not {protocol}")
    return Question(
        source,
        destination,
        int(text),
        protocol,  # type: ignore[arg-type]
        method,
        query.get("path", "/"),
        tuple(fields),
    )


def explained(
    question: Question, sections: Sections, origin: Callable[[str, ObjectKey], tuple[str, int]]
) -> Answer:
    """QuestionError. `origin`: file and document of an object."""
    found = explain(question, sections, sections.node)
    sides = tuple(
        msgspec.structs.replace(side, files=tuple(_files(side, origin))) for side in found.sides
    )
    return msgspec.structs.replace(found, sides=sides)


def _files(side: SideAnswer, origin: Callable[[str, ObjectKey], tuple[str, int]]) -> list[str]:
    files = []
    for policy in side.policies:
        kind, _, name = policy.partition(" ")
        assert kind in KINDS
        namespace, _, name = name.rpartition("/")
        try:
            file, document = origin(kind, ObjectKey(namespace, name))
        except KeyError:
            continue  # it has just gone
        files.append(f"{file} document {document}" if document else file)
    return files
