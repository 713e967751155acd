"""The choice of a backend in C against the same in Python, socket cookie by socket cookie."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import random
import struct
from array import array
from collections import Counter
from pathlib import Path

import pytest
from bpf_world import needs_bpf

from bpf import constants, layout, maglev, syscall
from bpf.maps import MAPS
from bpf.structs import Backend, Frontend, Number, Target

pytestmark = needs_bpf

SCHED_CLS, PROG_TEST_RUN, M64 = 3, 10, (1 << 64) - 1
FRONTEND = Target.of("10.96.0.1", 80, "TCP")
WEIGHTS = [5, 1, 1, 3]
BACKENDS = [Target.of(f"10.0.0.{number}", 8080, "TCP") for number in range(len(WEIGHTS))]
OFFSET = 512


def spread(cookie: int) -> int:
    cookie ^= cookie >> 33
    cookie = cookie * 0xFF51AFD7ED558CCD & M64
    cookie ^= cookie >> 33
    cookie = cookie * 0xC4CEB9FE1A85EC53 & M64
    cookie ^= cookie >> 33
    return cookie & 0xFFFFFFFF


class Program:
    """Loaded in this process: clang stays here as long as the module does."""

    def __init__(self) -> None:
        from bpf.compiler import Module

        self.module = Module(Path(__file__).with_name("bpf_choose.c"))
        self.maps = {}
        for name in MAPS:
            with contextlib.suppress(KeyError):  # of a header that is left out
                self.maps[name] = self.module.map_fd(name)
        names = {fd: name for name, fd in self.maps.items()}
        code = self.module.program("choose_for_packet", names).instructions(self.maps)
        self.fd = syscall.load_program("choose", SCHED_CLS, 0, code, "GPL")

    def put(self, name: str, key: bytes, value: bytes) -> None:
        syscall.update(self.maps[name], key, value)

    def run(self, cookie: int) -> tuple[int, Target]:
        """The program's result and what stands in the packet then."""
        packet = bytes(14) + struct.pack("=Q", cookie) + layout.TARGET.pack(FRONTEND)
        into, out = (
            ctypes.create_string_buffer(packet, len(packet)),
            ctypes.create_string_buffer(64),
        )
        # struct { prog_fd, retval, data_size_in, data_size_out, data_in, data_out, repeat, ... }
        attributes = ctypes.create_string_buffer(
            struct.pack(
                "=IIIIQQII",
                self.fd,
                0,
                len(packet),
                len(out),
                ctypes.addressof(into),
                ctypes.addressof(out),
                1,
                0,
            ),
            40,
        )
        syscall._call(PROG_TEST_RUN, attributes)
        _, result, _, size = struct.unpack_from("=IiII", attributes)
        return result, layout.TARGET.unpack(Target, out.raw[size - layout.TARGET.size : size])


@pytest.fixture(scope="module")
def program() -> Program:
    return Program()


def test_c_reads_the_table_that_python_wrote(program):
    names = [layout.TARGET.pack(backend) for backend in BACKENDS]
    table = maglev.table(list(zip(names, WEIGHTS, strict=True)), 251)
    for number, name in enumerate(names, 1):
        program.put("backends", layout.U32.pack(Number(number)), layout.BACKEND.pack(Backend(name)))
    for at, position in enumerate(table):
        slot = layout.U32.pack(Number(OFFSET + at))
        program.put("slots", slot, array("Q", [position + 1]).tobytes())
    frontend = layout.FRONTEND.pack(Frontend(OFFSET, 251, 0))
    program.put("frontends", layout.TARGET.pack(FRONTEND), frontend)

    # Cookies count up, and by more than one where several CPUs hand them out.
    anything = random.Random(0)
    cookies = [*range(1, 3000), *range(1 << 20, 1 << 24, 8192)]
    cookies += [anything.getrandbits(64) for _ in range(500)]
    chosen: Counter[int] = Counter()
    for cookie in cookies:
        result, backend = program.run(cookie)
        expected = table[spread(cookie) % 251]
        assert (result, backend) == (0, BACKENDS[expected]), cookie
        chosen[expected] += 1
    for position, weight in enumerate(WEIGHTS):
        share = len(cookies) * weight / sum(WEIGHTS)
        assert abs(chosen[position] - share) < 5 * share**0.5


def test_what_is_not_whole_is_refused(program):
    key = layout.TARGET.pack(FRONTEND)
    # No backends; slots beyond the map; slots that were never written; a backend never written.
    for frontend in (Frontend(0, 0, 0), Frontend(constants.SLOTS, 1, 0), Frontend(4096, 16, 0)):
        program.put("frontends", key, layout.FRONTEND.pack(frontend))
        assert program.run(1) == (-errno.ECONNREFUSED, FRONTEND)
    program.put("slots", layout.U32.pack(Number(4096)), layout.U64.pack(Number(77)))
    program.put("frontends", key, layout.FRONTEND.pack(Frontend(4096, 1, 0)))
    assert program.run(1) == (-errno.ECONNREFUSED, FRONTEND)
