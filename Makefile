# Each target does its own set-up into $(VENV); a second call starts at once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  settings: VENV=$(VENV) PYTHON=$(PYTHON)"

demo: $(READY) ## make a synthetic region, fit a small U-Net, map it, score it (into demo/)
	$(BIN)/python examples/demo.py demo

test: $(READY) ## lint, check types, run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(READY) ## measure reading, mapping and memory
	$(BIN)/python -m tests.bench

clean: ## remove the environment, the demo and caches
	rm -rf $(VENV) demo build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find s2seg tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "s2seg needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
