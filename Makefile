# make demo    everything from nothing to a report, on two CPU cores
# make test    the same set-up, then all tests but the slow ones: minutes, every part of the program
# make help    all targets
#
# The set-up is done once; stamp files (.core, .done) make it instant the second time.

PYTHON := python3
VENV := .venv
BIN := $(VENV)/bin
# Build of torch and DALI: 12, 13 or cpu; auto is what the driver runs. VERSIONS=oldest installs the oldest supported ones.
CUDA := auto
VERSIONS := newest
ASKED := $(if $(filter-out auto newest,$(CUDA) $(VERSIONS)),asked)
INSTALL = $(BIN)/python -m trainer.ops.install --cuda $(CUDA) $(if $(filter oldest,$(VERSIONS)),--oldest)
DATA := .data/fashion-mnist
RUN := runs/demo
SCRIPTS = .ci/run $(wildcard slurm/*.sh docs/bench/*.sh requirements/*.sh)

PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: help venv core asked data demo test test-slow test-all lint format clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.done ## Create .venv with everything; CUDA=12, 13 or cpu overrides the driver

# The core alone, which make demo needs.
core: $(VENV)/.core

$(VENV)/.core: requirements/core.txt requirements/lock.txt $(ASKED) | $(BIN)/python
	@$(INSTALL)
	@touch $@

$(VENV)/.done: $(wildcard requirements/*.txt) $(ASKED) | $(BIN)/python
	@$(INSTALL) all
	@touch $(VENV)/.core $@

$(BIN)/python:
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo 'Installing python3 and python3-venv'; \
	        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 python3-venv; \
	    else \
	        echo 'Python 3.11 or newer with venv is needed: as root, apt-get install python3 python3-venv' >&2; exit 1; \
	    fi; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3.12" >&2; \
      exit 1; }
	@$(PYTHON) -m venv $(VENV)

data: $(DATA)/.done ## Get Fashion-MNIST

$(DATA)/.done: | $(VENV)/.core
	@$(BIN)/python -m data.sources.fashion_mnist $(DATA)
	@touch $@

demo: core data ## Pre-train AdCo on Fashion-MNIST, evaluate, write the report
	@$(BIN)/python -m trainer pretrain configs/demo.yaml
	@$(BIN)/python -m trainer report $(RUN)
	@echo 'The report: $(RUN)/report.html'

test: venv data ## Run the tests of every part except the slow ones (ARGS='-k name' for some of them)
	@$(PYTEST) -m 'not slow' $(ARGS)

test-slow: venv data ## Run the tests that take long: SLURM, kills, every engine on four ranks
	@$(PYTEST) -m slow $(ARGS)

test-all: venv data ## Run all tests
	@$(PYTEST) $(ARGS)

lint: venv ## Check format, style, types and shell scripts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@for script in $(SCRIPTS); do bash -n "$$script" || exit 1; done
	@if command -v shellcheck >/dev/null; then shellcheck -x $(SCRIPTS); fi
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.dependabot .github/dependabot.yml

format: venv ## Format the code and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove .venv, the data and every tool's cache, not the runs
	@rm -rf $(VENV) .data .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
