# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything on a fresh machine. TORCH chooses the torch build.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint results clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras: installing again is cheap and happens only when pyproject.toml changes.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/fastprompt demo $(if $(FULL),--full,)

test: $(VENV)/.dev
	$(BIN)/fastprompt assets fetch dinov2-small textile smollm2-135m sms-spam
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measures everything that README.md and bench/results show, and rewrites their tables.
results: $(VENV)/.dev
	$(BIN)/fastprompt demo --full --out runs/full
	cp runs/full/results.jsonl bench/results/demo-textile.jsonl
	cp runs/full/results.png bench/results/demo-textile.png
	rm -f bench/results/vpt_step-cpu.jsonl bench/results/prompt_attention-cpu.jsonl
	$(BIN)/python -m bench.run vpt_step --json bench/results/vpt_step-cpu.jsonl
	for dtype in bfloat16 float32; do for prompts in 10 100; do \
	  $(BIN)/python -m bench.run prompt_attention --rounds 15 --set dtype=$$dtype prompts=$$prompts \
	    --json bench/results/prompt_attention-cpu.jsonl || exit 1; done; done
	$(BIN)/python -m bench.tune_text --out runs/text --json bench/results/tune-text.jsonl --png bench/results/tune-text.png
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
