# Each target does its own set-up into $(VENV); a second call starts at once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PEERS := build/venv-peers
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench bench-peers clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  settings: VENV=$(VENV) PYTHON=$(PYTHON)"

demo: $(READY) ## make a synthetic region, fit a small U-Net, map it, score it (into demo/)
	$(BIN)/python examples/demo.py demo

test: $(READY) ## lint, check types, run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(READY) ## measure speed and memory, every table in one go (beside others after bench-peers)
	$(BIN)/python -m tests.bench

# It sees the project's packages behind its own, so that torch is there once; what it installs, the project never sees.
# geo-inference insists on an old colorlog, which is the one pin it does not share.
bench-peers: $(READY) ## install what the bench compares with (geo-inference, odc-stac, torchgeo), apart from the project
	test -x $(PEERS)/bin/python || $(BIN)/python -m venv --without-pip $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	grep -v '^colorlog==' constraints.txt > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install --quiet -c $(PEERS)/constraints.txt torchgeo geo-inference==3.2.4 odc-stac

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
