# Two commands do all the set-up: `make demo` and `make test`. Everything lands in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PACKAGES := pando router worker kvstore kernels control bench

.PHONY: help setup demo test check lint type proto gpu-test gpu-bench size clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install everything Pando needs, torch for the CPU where the index has it

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Pando needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@# torch first and alone: an installer that sees it pinned and present never looks for another build of it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,dev]'
	@touch $@

demo: setup ## start a fleet of two workers, send a multi-tenant workload, print what sharing saves
	$(BIN)/pando demo

test: setup ## every check a change must pass: lint, types, layers, stubs, tests
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(MAKE) --no-print-directory check

check: lint type ## what `make test` runs, in the environment of the caller
	python -m pytest

lint: setup ## ruff, spelling, import layers, generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/python -m tests.check_stubs

type: setup ## mypy, strict
	$(BIN)/mypy

proto: setup ## write the gRPC stubs anew from proto/
	$(BIN)/python -m tests.check_stubs --write

gpu-test: setup ## the GPU's own tests
	$(BIN)/python -m pytest tests/gpu

gpu-bench: setup ## time the kernels on the GPU, beside its own limits and torch
	$(BIN)/python -m bench.kernels

size: ## lines of each package
	@for p in $(PACKAGES) tests; do printf '%-8s %6d\n' $$p $$(git ls-files "$$p/*.py" | grep -v _pb2 | xargs cat | wc -l); done

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
