"""What an automaton costs: 1,000 rules on one Service beside 10, in the kernel, in the compiled C
and on the proxy's own way. As root; no traffic.

The kernel's figure is BPF_PROG_TEST_RUN's of the very code that judges (tests/bench/automaton.c),
less what the same run costs where no table is found.
"""

from __future__ import annotations

import ctypes
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bpf import pins, syscall
from bpf.automaton import Automata
from l7proxy.automaton import compile_rules
from l7proxy.automaton_plan import plan
from l7proxy.http1_head import parse_request
from l7proxy.native import Native
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import Settings
from mesh.model.routeconfig import (
    Attachment,
    PathMatch,
    RouteMatch,
    RouteRule,
    RouteSection,
    ValueMatch,
    WeightedBackend,
)

_SCHED_CLS, _PROG_RUN = 3, 10
_REPEAT = 200_000
_LISTENER = "Service/bench/web/80"
_SETTINGS = Settings()


class Row(NamedTuple):
    """Times of one request in ns; `judged`: by which rule, 0: the proxy's."""

    rules: int
    compile_s: float
    states: int
    classes: int
    atoms: int
    table_bytes: int
    head: str
    judged: int
    kernel_ns: float
    native_ns: float
    proxy_ns: float


def routes(count: int) -> RouteIndex:
    """Of each ten rules: five by path, three by path and header, two by path and method; the last
    of all is for everything."""
    rules = []
    for number in range(count - 1):
        path = PathMatch("PathPrefix", f"/service-{number}/v1")
        headers = (ValueMatch("x-version", f"v{number % 7}"),) if number % 10 in (5, 6, 7) else ()
        method = "GET" if number % 10 > 7 else None
        rules.append(RouteRule((RouteMatch(path, method, headers),), backends=_BACKENDS))
    rules.append(RouteRule((RouteMatch(),), backends=_BACKENDS))
    index = RouteIndex()
    for start in range(0, count, 16):  # as many as an HTTPRoute may have
        attachment = Attachment(_LISTENER, ("*",))
        some = tuple(rules[start : start + 16])
        section = RouteSection("HTTPRoute", "bench", f"r{start}", "", (attachment,), some)
        index.put(f"route/HTTPRoute/bench/r{start}", section)
    return index


_BACKENDS = (WeightedBackend("cluster/Service/bench/web/80"),)


def heads(count: int) -> dict[str, bytes]:
    """About 45 bytes, as wrk sends; 650 as a browser does."""
    short = b"GET / HTTP/1.1\r\nHost: web.bench\r\nX-A: bc\r\n\r\n"
    agent = (
        b"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)\r\n"
    )
    fields = (
        agent,
        b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8\r\n",
        b"Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9,de;q=0.8\r\n",
        b"Cookie: session=" + b"0123456789abcdef" * 8 + b"; theme=dark; consent=all\r\n",
        b"Referer: http://web.bench/service-1/v1/a/page/that/refers/to/this/one?with=a&query=too\r\n",
        b"Cache-Control: max-age=0\r\nX-Version: v5\r\n",
    )
    start = b"GET /service-%d/v1/items?page=2 HTTP/1.1\r\nHost: web.bench\r\n" % (count - 2)
    return {"short": short, "browser": start + b"".join(fields) + b"\r\n"}


class _Kernel:
    def __init__(self, directory: Path) -> None:
        from bpf.compiler import Module

        self._module = Module(Path(__file__).with_name("automaton.c"))
        names = ("automata", "automaton_arenas", "verdicts", "generations")
        self._maps = {name: self._module.map_fd(name) for name in names}
        program = self._module.program("judge_packet", {fd: one for one, fd in self._maps.items()})
        code = program.instructions(self._maps)
        self._program = syscall.load_program("bench", _SCHED_CLS, 0, code, "GPL")
        pins.prepare(directory)
        for name in names[:2]:
            syscall.pin(self._maps[name], pins.map_path(directory, name))
        self.automata = Automata(directory)

    def run(self, generation: int, head: bytes) -> tuple[int, float]:
        """The rule, and ns for one run."""
        syscall.update(self._maps["generations"], bytes(4), struct.pack("=Q", generation))
        data = ctypes.create_string_buffer(bytes(16) + head, 16 + len(head))
        # prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, duration
        question = struct.pack(
            "=4I2Q2I", self._program, 0, len(data), 0, ctypes.addressof(data), 0, _REPEAT, 0
        )
        attributes = ctypes.create_string_buffer(question, len(question))
        syscall._call(_PROG_RUN, attributes)
        duration: int = struct.unpack_from("=I", attributes.raw, 36)[0]
        verdict = syscall.lookup(self._maps["verdicts"], bytes(4), 24)
        assert verdict is not None
        return struct.unpack_from("=I", verdict)[0], float(duration)


def measure() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as scratch:
        directory = Path(scratch) / "pins"
        try:
            kernel = _Kernel(directory)
            for count in (10, 1_000):
                rows += _rows(kernel, count)
            kernel.automata.close()
        finally:
            pins.remove(directory)
    return rows


def _rows(kernel: _Kernel, count: int) -> list[Row]:
    index = routes(count)
    planned = plan(_LISTENER, index, (), _SETTINGS)
    began = time.perf_counter()
    automaton = compile_rules(planned.ordered, planned.limits, planned.generation)
    took = time.perf_counter() - began
    kernel.automata.put(planned.generation, automaton.table)
    native = Native(automaton.table)
    rows = []
    for name, head in heads(count).items():
        judged, all_ns = kernel.run(planned.generation, head)
        _, empty_ns = kernel.run(0, head)
        rows.append(
            Row(
                count,
                took,
                automaton.states,
                automaton.classes,
                len(automaton.facts),
                len(automaton.table),
                f"{name}, {len(head)} bytes",
                judged,
                all_ns - empty_ns,
                _ns(lambda head=head: native.judge(head), 50_000),
                _ns(lambda head=head: _on_its_way(index, head), 5_000),
            )
        )
    return rows


def _on_its_way(index: RouteIndex, head: bytes) -> object:
    return index.match(_LISTENER, parse_request(head, b"http", _SETTINGS).head)


def _ns(call: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter_ns()
        for _ in range(times // 5):
            call()
        best = min(best, (time.perf_counter_ns() - began) / (times // 5))
    return best


def run() -> None:
    print("automata: what judging one request costs, by rules on one Service", flush=True)
    line = "{:>6} {:>10} {:>7} {:>7} {:>6} {:>10}  {:<20} {:>5} {:>10} {:>10} {:>9}"
    head = ("rules", "compile", "states", "classes", "atoms", "bytes", "head", "rule")
    print(line.format(*head, "kernel ns", "native ns", "proxy ns"))
    for row in measure():
        figures = (f"{one:,.0f}" for one in (row.kernel_ns, row.native_ns, row.proxy_ns))
        size = (f"{row.compile_s:.2f} s", row.states, row.classes, row.atoms, row.table_bytes)
        print(line.format(row.rules, *size, row.head, row.judged, *figures))
    print("native: called from Python, which is most of it. proxy: the head parsed and matched.\n")
