.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint format clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart_cpu

help:  ## Show this text
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

$(VENV)/.installed: requirements.lock launch/install.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "error: Python 3.11 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	./launch/install.sh $(VENV)
	@touch $@

install: $(VENV)/.installed  ## Make .venv with the versions of requirements.lock

quickstart: $(VENV)/.installed  ## Install, prepare text, train 64 heads for a few minutes on the CPU, evaluate, write a sample
	@rm -rf $(RUN)
	@test -f data/stdlib/manifest.json || $(BIN)/python launch/prepare.py --input stdlib --output data/stdlib --vocab-size 4096
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --log_level warning --num_accelerators 2 launch/pretrain.py --config configs/quickstart_cpu.yaml
	$(BIN)/python launch/evaluate.py $(RUN) --split test
	@echo && $(BIN)/python launch/generate.py $(RUN) --prompt "def read_" --max-new-tokens 120
	@echo && echo "TensorBoard  $(BIN)/tensorboard --logdir $(dir $(RUN))"
	@echo "checkpoint   $(RUN)/checkpoints/$$(cat $(RUN)/checkpoints/latest)"
	@echo "tokenizer    data/stdlib/tokenizer.json"

test: $(VENV)/.installed  ## Install what is needed, then run the whole test suite
	@started=$$(date +%s); \
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder tests/e2e tests/unit && \
	$(BIN)/python -m pytest -n auto --dist loadscope tests/dist tests/gpu; status=$$?; \
	echo "tests took $$(( ($$(date +%s) - started) / 60 )) min $$(( ($$(date +%s) - started) % 60 )) s"; exit $$status

lint: $(VENV)/.installed  ## Format and lint checks, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment, caches and what the quickstart made
	rm -rf $(VENV) $(RUN) data/stdlib .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
