# The first Python on the PATH that vLLM supports; choose another with `make PYTHON=/path/to/python3 …`.
PYTHON ?= $(or $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done),python3)
BIN := .venv/bin
# Tests run side by side, those of a file in one process, in the order of tests/conftest.py.
PROCESSES ?= 2

.PHONY: help env quickstart test versions lint clean distclean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' Makefile | expand -t 20

env:  ## make .venv and install everything into it, if need be
	@$(PYTHON) scripts/bootstrap.py

quickstart: env  ## serve a small model quantized to NVFP4, ask it a question, stop the server
	@$(BIN)/python scripts/quickstart.py

test: env  ## the test suite; options for pytest in ARGS, e.g. make test ARGS="-m gpu"
	$(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder $(ARGS)

versions: env  ## the plugin's tests against the oldest and the newest vLLM supported
	$(BIN)/python scripts/vllm_versions.py

lint: env  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove what tests, checks and builds leave behind
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## clean, and remove the environment and the converted checkpoint too
	rm -rf .venv .cache
