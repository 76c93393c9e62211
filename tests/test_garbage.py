"""Garbage collection: rare before the work, as usual inside and only among its own objects, as before afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

from lethe.runs import garbage


def test_inside_collections_are_as_usual_and_the_outermost_unfreezes():
    before = gc.get_threshold(), gc.get_freeze_count()
    try:
        with garbage.seldom():
            rare = gc.get_threshold()
            with garbage.frozen():
                assert gc.get_threshold() == garbage._usual and gc.get_freeze_count() > 1000
                with garbage.frozen():
                    pass
                assert gc.get_threshold() == garbage._usual and gc.get_freeze_count() > 1000
            assert gc.get_threshold() == rare != garbage._usual and gc.get_freeze_count() == 0
        assert gc.get_freeze_count() > 1000
    finally:
        gc.set_threshold(*before[0])
        gc.unfreeze()
    assert gc.get_freeze_count() == before[1] == 0


def test_a_command_collects_rarely_while_it_imports_torch_and_not_at_its_end():
    code = """
import gc, sys
from lethe import cli
full = []
gc.callbacks.append(lambda phase, info: full.append(info["generation"]) if phase == "start" else None)
def main():
    import torch
    return 3
cli.main = main
code = cli.console()
print(code, len(full) < 10, gc.get_freeze_count() > 100_000)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["3", "True", "True"]
