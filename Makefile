# make install | demo | test | test-all | lint | docs; each works on a fresh clone: it installs the environment first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-slow test-all lint docs clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: install
	$(BIN)/lethe demo --out demo

# The quick tests: a few minutes, and nothing is installed outside .venv.
test: install
	$(PYTEST) -m "not slow and not slurm"

# What the quick tests leave out. As root on Debian this installs and starts a Slurm cluster of one node.
test-slow: install
	$(PYTEST) -m "slow or slurm"

test-all: test test-slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python scripts/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv demo site
