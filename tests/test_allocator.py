"""Memory that an update frees is kept for the next one: seen from outside, by the pages that the system maps anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import contextlib, ctypes, resource, sys
from lethe.models.allocator import kept_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def update():
    pieces = [libc.malloc(20 * 2**20) for _ in range(10)]
    for piece in pieces:
        libc.memset(piece, 1, 20 * 2**20)
    while pieces:
        libc.free(pieces.pop())

with kept_memory() if sys.argv[1] == "kept" else contextlib.nullcontext():
    for _ in range(3):
        update()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        update()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_mapped_once_and_given_back_at_the_end():
    def found(how: str) -> list[int]:
        command = [sys.executable, "-c", FAULTS, how]
        return [int(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]

    (kept, resident), (plain, resident_plain) = found("kept"), found("plain")
    assert kept < 100
    assert plain > 10_000  # else there would be nothing to keep
    assert resident < resident_plain + 24  # MiB
