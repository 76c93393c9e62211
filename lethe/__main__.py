"""`python -m lethe`: the command line."""

from __future__ import annotations

import sys

from lethe.cli import console

if __name__ == "__main__":
    sys.exit(console())
