# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything on a fresh machine. TORCH chooses the torch build.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test gpu-test asan lint results bench clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras: installing again happens only when what is installed or compiled changes. Without build
# isolation, since the C++ kernels compile against the torch that is here; without a compiler they are left out.
BUILT_FROM := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/core/*)

$(VENV)/.demo: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.dev: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/fastprompt demo $(if $(FULL),--full,)

# Processes of the test-suite, each with one thread and about 2 GB.
JOBS ?= 2

test: $(VENV)/.dev
	$(BIN)/fastprompt assets fetch dinov2-small textile smollm2-135m sms-spam openmoji emoji-names clip-bpe
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# The full Triton matrix on a CUDA device, with the Python at hand (PYTHON=...), which brings its own torch and Triton.
gpu-test:
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)
	$(PYTHON) -m pytest -m "not gpu" tests/test_warmup.py tests/test_*_triton.py $(PYTEST_ARGS)

# The C++ kernels under AddressSanitizer and UBSan: the core's unit tests, then the extension itself in a copy of the
# package, on the tests of the kernels. (`make test` runs the unit tests so, too.)
SANITIZED := build/sanitized
SANITIZE  := -fsanitize=address,undefined -fno-sanitize-recover=all
CXX_TESTS := $(wildcard tests/test_*_cpp.py) tests/test_cpp_threads.py
# The libraries of the compiler that setup.py takes: GCC's names.
COMPILER := import os, sysconfig; print(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")

asan: $(VENV)/.dev
	$(MAKE) -C csrc asan
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r csrc kernels fastprompt tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/fastprompt/_C.* && ln -sfn ../kernels/triton $(SANITIZED)/fastprompt/kernels
	cd $(SANITIZED) && CFLAGS="-O1 $(SANITIZE)" LDFLAGS="$(SANITIZE)" $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && test -f fastprompt/_C.abi3.so && cxx=$$($(abspath $(BIN))/python -c '$(COMPILER)') && \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libubsan.so)" \
	PYTHONPATH=. $(abspath $(BIN))/python -m pytest -q --timeout=1200 $(CXX_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measures everything that README.md and bench/results show, and rewrites their tables.
results: $(VENV)/.dev
	$(BIN)/fastprompt demo --full --out runs/full
	cp runs/full/results.jsonl bench/results/demo-textile.jsonl
	cp runs/full/results.png bench/results/demo-textile.png
	$(BIN)/python -m bench.tune_text --out runs/text --json bench/results/tune-text.jsonl --png bench/results/tune-text.png
	$(BIN)/python -m bench.tune_openmoji --json runs/tune-openmoji.jsonl --png bench/results/tune-openmoji.png
	cp runs/tune-openmoji.jsonl bench/results/tune-openmoji.jsonl
	$(BIN)/fastprompt continual --tasks 5 --seed 1 --out runs/lanes
	cp runs/lanes/continual.json bench/results/continual-openmoji.json
	$(BIN)/fastprompt count vilt --recipe vpt apt --length 200 --batch 256 --json bench/results/count-vilt.json
	rm -f bench/results/*-$(DEVICE).jsonl
	$(MAKE) bench

# Every case on DEVICE (cpu or cuda); what its results files hold already is not measured again.
DEVICE ?= cpu
ROUNDS ?= 15
MODES  := mode=forward,forward+backward
DTYPES := dtype=bfloat16,float32
ifeq ($(DEVICE),cuda)
DTYPES := $(DTYPES),float16
endif
BENCH   = $(BIN)/python -m bench.run --device $(DEVICE) --resume --json bench/results/$(1)-$(DEVICE).jsonl $(1)

bench: $(VENV)/.dev
	$(call BENCH,vpt_step)
	$(call BENCH,apt_step) --set model=DINOv2-S,ViT-B
	$(call BENCH,prefix_step) --set $(DTYPES) checkpointing=0,1
	$(call BENCH,coop_text) --rounds 5 --set classes=10,100,1000 dtype=float32,bfloat16
	$(call BENCH,cocoop_step) --rounds 3 --set batch=8 tower=0,1
	$(call BENCH,cocoop_step) --rounds 1 --set batch=32
	$(call BENCH,maple_step) --rounds 5
	$(call BENCH,prompt_attention) --rounds $(ROUNDS) --set prompts=10,50,100,200 $(DTYPES) $(MODES)
	$(call BENCH,prompt_attention_varlen) --rounds $(ROUNDS) --set $(DTYPES) $(MODES)
	$(call BENCH,diffuse_prompts) --rounds $(ROUNDS) --set prompts=100,200 $(DTYPES) $(MODES)
	$(call BENCH,decoupled_attention) --rounds $(ROUNDS) --set shape=sd15,sdxl $(DTYPES) $(MODES)
	$(call BENCH,ipadapter) --rounds 3
	$(call BENCH,summarize_tokens) --rounds $(ROUNDS) --set $(DTYPES) $(MODES)
	$(call BENCH,multilane) --rounds 5 --set tasks=1,4,10
	$(call BENCH,key_scores) --rounds 5 --set tokens=1024,4096,8192,16384
	$(call BENCH,compress_kv) --rounds 5 --set $(DTYPES)
	$(call BENCH,prefill_compress) --rounds 5
	$(call BENCH,decode) --rounds 5
	$(call BENCH,decode_attention) --rounds $(ROUNDS) --set tokens=1024,8192,32768 $(DTYPES)
ifeq ($(DEVICE),cpu)
	$(call BENCH,cpu_candidates) --rounds $(ROUNDS) --set prompts=10,100 $(DTYPES)
endif
	$(BIN)/python -m bench.roofline --device $(DEVICE) --json bench/results/ceilings-$(DEVICE).jsonl
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
