.DEFAULT_GOAL := help
.PHONY: help install quickstart test thorough soak lint format locks clean

VENV := .venv
BIN := $(VENV)/bin
# The environment's own Python if there is one, else the first that has a lock file.
PYTHON ?= $(shell for python in $(BIN)/python python3.11 python3.12 python3.13 python3; do \
	test -f requirements/$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null).lock && break; done; echo $$python)
TORCH ?=
INSTALL = $(PYTHON) launch/install.py $(VENV) $(addprefix --torch=,$(TORCH))
RUN := runs/quickstart_cpu
# One more than cores: ranks and launchers of a test wait for one another.
WORKERS ?= $(shell expr $$(env -u OMP_NUM_THREADS nproc) + 1)

help:  ## Show this text
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

$(VENV)/.installed: $(wildcard requirements/*.lock) launch/install.py
	$(INSTALL)
	@touch $@

install: $(VENV)/.installed  ## Make .venv with the locked versions; PYTHON=python3.12, TORCH=system for the machine's own torch
	@$(INSTALL) --check

quickstart: $(VENV)/.installed  ## Install, prepare text, train 64 heads for a few minutes on the CPU, evaluate, write a sample
	@rm -rf $(RUN)
	@test -f data/stdlib/manifest.json || $(BIN)/python launch/prepare.py --input stdlib --output data/stdlib --vocab-size 4096
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --log_level warning --num_accelerators 2 launch/pretrain.py --config configs/quickstart_cpu.yaml
	$(BIN)/python launch/evaluate.py $(RUN) --split test
	@echo && $(BIN)/python launch/generate.py $(RUN) --prompt "def read_" --max-new-tokens 120
	@echo && echo "TensorBoard  $(BIN)/tensorboard --logdir $(dir $(RUN))"
	@echo "checkpoint   $(RUN)/checkpoints/$$(cat $(RUN)/checkpoints/latest)"
	@echo "tokenizer    data/stdlib/tokenizer.json"

test: $(VENV)/.installed  ## Install what is needed, then run the test suite; WORKERS=4 for so many tests at once
	@started=$$(date +%s); unset PYTHONDONTWRITEBYTECODE; \
	$(BIN)/python -m pytest -m "not thorough" -n $(WORKERS) --dist loadscope --no-loadscope-reorder tests/dist tests/gpu tests/e2e tests/unit; status=$$?; \
	echo "tests took $$(( ($$(date +%s) - started) / 60 )) min $$(( ($$(date +%s) - started) % 60 )) s"; exit $$status

thorough: $(VENV)/.installed  ## Tests on four ranks of what the suite shows on two, and those that compile for long
	$(BIN)/python -m pytest -m thorough -n $(WORKERS) --dist loadscope tests

SEED := 1
PAIRS := 40
KILLS := 50
soak: $(VENV)/.installed  ## Draw layouts that resume from each other, and runs that are killed; SEED=7 PAIRS=60 KILLS=50 ROWS=FILE
	$(BIN)/python -m tests.soak --seed $(SEED) --pairs $(PAIRS) --kills $(KILLS) $(addprefix --rows=,$(ROWS))

lint: $(VENV)/.installed  ## Format and lint checks, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

LOCK = --extra data --extra dev --extra examples --extra s3 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --quiet $(UPGRADE)
locks: $(VENV)/.installed  ## Lock what pyproject.toml asks for, for each Python; UPGRADE=--upgrade for the newest versions
	@for lock in requirements/*.lock; do version=$$(basename $$lock .lock); echo $$lock; \
	printf 'pip\nsetuptools\n' | $(BIN)/uv pip compile pyproject.toml - --python-version $$version $(LOCK) --output-file $$lock && \
	sed -i -E "/^(nvidia|cuda)-/d; 1i # Made by \`make locks\`: all that the project needs on Python $$version, Linux x86-64. torch pins its CUDA libraries itself." \
	$$lock || exit 1; done

clean:  ## Remove the environment, caches and what the quickstart made
	rm -rf $(VENV) $(RUN) data/stdlib .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
