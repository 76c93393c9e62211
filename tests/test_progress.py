"""Progress where there is no terminal, and what is said of a busy machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lethe.runs import machine

WORK = """
import time
from lethe import progress
progress.EVERY = 0.05
with progress.bar("Working", 4, "steps") as advance:
    advance(1)
    for i in range(3):
        time.sleep(0.06)
        advance(1, f"loss {i} [not markup] " + "x" * 200)
print("answer")
"""


def test_without_a_terminal_there_is_a_line_every_so_often():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout == "answer\n" and len(lines) == 4  # and one at the end
    assert [line.split(" Working: ")[1].split(" in ")[0] for line in lines] == [f"{n} of 4 steps" for n in (2, 3, 4, 4)]
    assert all(f"loss {i} [not markup] x" in line for i, line in enumerate(lines[:3]))
    assert "left" in lines[0] and "left" not in lines[3]


@pytest.mark.parametrize(
    ("threads", "cores_there", "used", "said"),
    [
        (2, 2, 0.1, None),
        (2, 2, 1.9, "set OMP_NUM_THREADS=1"),
        (1, 2, 2.0, None),
        (4, 64, 59.0, None),
        (8, 64, 60.0, "set OMP_NUM_THREADS=4"),
    ],
)
def test_threads_without_a_free_core_each_are_said(threads, cores_there, used, said):
    found = machine.crowded(threads, cores_there, used)
    assert found is None if said is None else said in found and "\n" not in found
