"""The automaton three times: in the kernel on a real socket, in this process, and what it stands
for: the proxy's own parser, normaliser and matchers."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from bpf_world import pin_directory

from bpf import pins, syscall
from bpf.automaton import Automata
from l7proxy.automaton import Automaton, compile_rules
from l7proxy.automaton_plan import Plan
from l7proxy.http1_codec import ClientCodec
from l7proxy.http1_head import Request, parse_request
from l7proxy.message import ProtocolError
from l7proxy.native import Judged, Native
from l7proxy.policy_rules import CompiledRule, _http, _match
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import Settings

_SK_MSG, _SK_MSG_VERDICT = 16, 7
_JUDGED = struct.Struct("=IIIIQ")


class Kernel:
    """judge_head on the messages of one socket, with bpf.automaton writing the tables."""

    def __init__(self, directory: Path) -> None:
        from bpf.compiler import Module

        self._module = Module(Path(__file__).with_name("bpf_automaton.c"))
        pinned = ("automata", "automaton_arenas")
        own = ("senders", "questions", "verdicts")
        self._maps = {name: self._module.map_fd(name) for name in (*pinned, *own)}
        names = {fd: name for name, fd in self._maps.items()}
        program = self._module.program("judge_message", names)
        code = program.instructions(self._maps)
        self._program = syscall.load_program("judge", _SK_MSG, _SK_MSG_VERDICT, code, "GPL")
        self.directory = directory
        pins.prepare(directory)
        for name in pinned:
            syscall.pin(self._maps[name], pins.map_path(directory, name))
        self.automata = Automata(directory)
        listener = socket.create_server(("127.0.0.1", 0))
        self._sender = socket.create_connection(listener.getsockname())
        self._receiver = listener.accept()[0]
        listener.close()
        self._sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._link = syscall.link(self._program, self._maps["senders"], _SK_MSG_VERDICT)
        # A socket has the program that the map has when it comes in.
        key, fd = struct.pack("=I", 1), struct.pack("=I", self._sender.fileno())
        syscall.update(self._maps["senders"], key, fd)

    def close(self) -> None:
        os.close(self._link)
        self._sender.close()
        self._receiver.close()
        self.automata.close()

    def judge(self, generation: int, head: bytes, egress: int = 0, ingress: int = 0) -> Judged:
        zero = bytes(4)
        syscall.update(self._maps["verdicts"], zero, b"\xff" * _JUDGED.size)
        question = struct.pack("=QII", generation, egress, ingress)
        syscall.update(self._maps["questions"], zero, question)
        self._sender.sendall(head)
        left = len(head)
        while left:
            left -= len(self._receiver.recv(left))
        found = syscall.lookup(self._maps["verdicts"], zero, _JUDGED.size)
        assert found is not None
        assert found != b"\xff" * _JUDGED.size, "the program has not run"
        return Judged(*_JUDGED.unpack(found))


@contextlib.contextmanager
def kernel(parent: Path) -> Iterator[Kernel]:
    with pin_directory(parent) as directory, contextlib.closing(Kernel(directory)) as one:
        yield one


class Judges:
    """One plan in the kernel and in this process; both must say the same."""

    def __init__(self, kernel: Kernel | None, plan: Plan) -> None:
        self.plan = plan
        self.automaton: Automaton = compile_rules(plan.ordered, plan.limits, plan.generation)
        self._native = Native(self.automaton.table)
        self._kernel = kernel
        if kernel is not None:
            kernel.automata.put(plan.generation, self.automaton.table)

    def close(self) -> None:
        if self._kernel is not None:
            self._kernel.automata.remove(self.plan.generation)

    def judge(self, head: bytes, egress: int = 0, ingress: int = 0) -> Judged:
        judged = self._native.judge(head, egress, ingress)
        if self._kernel is not None and head:
            theirs = self._kernel.judge(self.plan.generation, head, egress, ingress)
            assert theirs == judged, head
        return judged


def reference(head: bytes, settings: Settings) -> tuple[bytes, Request] | None:
    """What the proxy reads at the beginning of the bytes, and how many; None: it refuses it, or
    there is no whole head."""
    end = head.find(b"\r\n\r\n")
    if end < 0 or end + 4 > settings.max_head_bytes:
        return None
    block = head[: end + 4]
    try:
        return block, parse_request(block, b"http", settings)
    except ProtocolError:
        return None


def check(judges: Judges, routes: RouteIndex, settings: Settings, head: bytes) -> Judged:
    """No executor says anything that the reference does not say."""
    plan = judges.plan
    lists = range(len(plan.lists) + 1)
    read = reference(head, settings)
    found = Judged()
    for egress in lists:
        for ingress in {0, egress, len(plan.lists) - egress}:
            judged = judges.judge(head, egress, ingress)
            found = found if (egress, ingress) != (0, 0) else judged
            if not judged.rule:
                continue
            assert read is not None, head
            _same(plan, routes, read, head, judged)
            for number, rule in ((egress, judged.egress), (ingress, judged.ingress)):
                _allowed(plan, read[1], number, rule)
    return found


def _same(
    plan: Plan, routes: RouteIndex, read: tuple[bytes, Request], head: bytes, judged: Judged
) -> None:
    block, request = read
    asked = request.head
    assert judged.size == len(block), head
    assert judged.length == (asked.body if isinstance(asked.body, int) else 0), head
    # Nothing of it was changed, and nothing of it is about the connection.
    line, *fields = block[:-4].split(b"\r\n")
    assert line == asked.method + b" " + asked.target + b" HTTP/1.1", head
    split = [field.partition(b":") for field in fields]
    given = [(name.lower(), value.strip(b" ")) for name, _, value in split]
    own = (b"host", b"content-length", b"connection")
    assert [one for one in given if one[0] not in own] == asked.headers, head
    assert [value for name, value in given if name == b"host"] == [asked.authority], head
    # It says what the proxy's own way would, in the same words, but that persistence is each hop's.
    # (The proxy has the fields in another order, names in lower case, one blank before values.)
    theirs, *written = ClientCodec(Settings()).request(asked)[:-4].split(b"\r\n")
    assert line == theirs, head
    said = [name + b": " + value for name, value in given if name != b"connection"]
    assert sorted(said) == sorted(written), head
    assert {value.lower() for name, value in given if name == b"connection"} <= {b"keep-alive"}
    assert request.keep_alive, head
    assert (asked.upgrade, asked.expect_continue, asked.trailers_ok) == (None, False, False), head
    assert not any(name == b"x-forwarded-client-cert" for name, _ in given)
    # And it is the rule's that the matcher finds.
    planned = plan.rules[judged.rule - 1]
    assert not planned.why
    if plan.listener:
        result = routes.match(plan.listener, asked)
        assert result is not None, head
        ours = planned.result.route, planned.result.rule.index
        assert (result.route, result.rule.index) == ours, head


def _allowed(plan: Plan, request: Request, number: int, rule: int) -> None:
    if not number:
        assert rule == 0
        return
    compiled = [CompiledRule(one, _http(one, "")) for one in plan.lists[number - 1]]
    source, mends = _match(compiled, request.head)
    assert source == plan.lists[number - 1][rule - 1].source
    assert not mends
