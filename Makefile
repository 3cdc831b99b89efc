# The first use of a target makes .venv and installs into it; pyproject.toml decides when that is done again.
# Another Python: make PYTHON=python3.12 test. More for pip: PIP_EXTRA_INDEX_URL and its like, as environment.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help setup demo test lint types wheel bench-train bench-plan fuzz bench paper check clean

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## Make .venv and install everything into it

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python of 3.11 or later here; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Train, export, verify and use a small model, in a few minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

test: $(READY)  ## Run the tests on all cores, and say which are skipped
	$(BIN)/python -m pytest -n logical --dist loadfile -rfEs

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Check types
	$(BIN)/mypy

wheel: $(READY)  ## Build dist/*.whl and try it in a clean environment elsewhere
	$(BIN)/python tests/check_wheel.py

bench-train: $(READY)  ## Measure training: recurrence, vocabularies, clock atoms
	$(BIN)/python benchmarks/bench_train.py

fuzz: $(READY)  ## Read damaged bundles at random: each must be refused by name
	$(BIN)/python tests/fuzz_bundle.py

bench-plan: $(READY)  ## Compare what plan tells of the presets with what they cost
	$(BIN)/python benchmarks/plan.py

bench: $(READY)  ## Measure on this machine what is promised; ONLY=speed,flat for some of it
	$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only $(ONLY))

paper: $(READY)  ## Compare all models, ablations and tasks, in MINUTES=30; DATA=folder of train.txt and valid.txt
	$(BIN)/python benchmarks/paper.py $(if $(DATA),--data "$(DATA)") $(if $(MINUTES),--minutes $(MINUTES))

check: test lint types wheel  ## All that is checked before a change goes in

clean:  ## Remove what the tools made (not .venv, not your runs)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
