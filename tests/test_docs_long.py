"""The two longest pages, in a file of their own so that another process can have the rest."""

from __future__ import annotations

import pytest
from test_docs import NANO, STANDARD, blocks, commands, here, run, shortened  # noqa: F401


@pytest.mark.slow
def test_quickstart(here):  # noqa: F811
    for command in commands("docs/quickstart.md"):  # test_demo.py has a whole run of the same recipes
        run(shortened(command), here)
    assert (here / "report" / "index.html").exists()
    for code in blocks("docs/quickstart.md", "python"):
        (here / "example.py").write_text(code.replace(STANDARD, NANO))
        assert "lab_forget_robust" not in run("python example.py", here)


@pytest.mark.slow
def test_sweeps_page(here):  # noqa: F811
    for command in commands("docs/guides/sweeps.md"):
        run(command, here)
