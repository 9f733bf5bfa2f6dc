# Every target works on a fresh machine: the first one that needs Python packages makes $(VENV) by itself.
#   make test PYTHON=python3.12        another interpreter for a new environment
#   make test VENV=~/envs/manyviews    another place for it

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# two processes; a file stays in one of them, and the end-to-end tests, the longest, are collected first. On a machine with a GPU, too,
# they run on the CPU, for which they are written: `make gpu` is for the GPU
PYTEST := CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP  := $(VENV)/.manyviews-installed
# Python compiles what it imports, once; where it must not write that down, pip compiles all
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile,--no-compile)

export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types unit e2e bench gpu study chaos clean

help: ## this page
	@echo "Manyviews: pretrain vision backbones without labels."
	@echo
	@echo "  First time?  make demo   trains a small SwAV on built-in pictures, on this machine, in minutes."
	@echo "  Your images? $(BIN)/manyviews pretrain swav-small --data.path FOLDER"
	@echo "  Then         $(BIN)/manyviews --help   lists every verb."
	@echo
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  The first target that needs packages installs them into $(VENV) (about 3-5 minutes); VENV= and PYTHON= change that."

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 14) else \
	  "PYTHON=$(PYTHON): is %d.%d, but Python 3.11, 3.12 or 3.13 is needed; try make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "Making the environment $(VENV)"; $(PYTHON) -m venv $(VENV); } \
	  || { echo "PYTHON=$(PYTHON): cannot make an environment; install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Installing Manyviews and its packages into $(VENV): about 3-5 minutes, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(COMPILE) --editable ".[dev]"
	@touch $@

install: $(STAMP) ## make the environment and nothing else

demo: $(STAMP) ## train swav-small on built-in pictures and say what was learned
	@$(BIN)/manyviews pretrain swav-small

test: lint types $(STAMP) ## what must pass: lint, types and every test
	@$(PYTEST)

lint: $(STAMP) ## ruff
	@$(BIN)/python -m ruff check .

types: $(STAMP) ## mypy, strict on methods/ and the config
	@$(BIN)/python -m mypy

unit: $(STAMP) ## the tests that do not train end to end
	@$(PYTEST) -m "not e2e"

e2e: $(STAMP) ## the tests that do
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m e2e

bench: $(STAMP) ## the measurements behind every published figure
	@echo "Each file of benchmarks/ measures one thing; run it as $(BIN)/python FILE --help:"
	@for file in $(wildcard benchmarks/*.py); do echo "  $$file  $$(sed -n '1s/"""//gp' $$file)"; done

gpu: $(STAMP) ## on a machine with a GPU: the tests that need one, then a table of what it makes of five recipes (8 minutes)
	@$(BIN)/python -m pytest tests/gpu
	@PYTHONPATH=. $(BIN)/python benchmarks/gpu.py

study: $(STAMP) ## the papers' findings as studies
	@for name in byol-target coke-bound; do $(BIN)/manyviews study $$name || exit 1; done

chaos: $(STAMP) ## kill a run again and again, resume it, and compare with a run that was left alone
	@$(BIN)/python benchmarks/chaos.py
	@$(BIN)/python benchmarks/chaos.py --workers 2
	@$(BIN)/python benchmarks/chaos.py --preempt
	@$(BIN)/python benchmarks/chaos.py --elastic
	@$(BIN)/python benchmarks/chaos.py --jobs

clean: ## remove caches and build output; runs, models and the environment stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find manyviews.py methods pipeline tuning tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
