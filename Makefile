# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything on a fresh machine. TORCH chooses the torch build.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test installed gpu-test sanitize-gpu asan lint results bench bench-gpu clean
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

# What follows runs on a CUDA device, with the Python at hand (PYTHON=...) and its own torch and Triton, without network.
# Where fastprompt is not installed the checkout runs as it is, its kernels linked to where Python looks: compiling the
# C++ kernels would take a minute of the GPU.
installed:
	@$(PYTHON) -c "import fastprompt.kernels" 2>/dev/null || ln -sfn ../kernels/triton fastprompt/kernels

# The full Triton matrix, and every other test that runs kernels on the device where there is one. PYTEST_ARGS="-n 12"
# where pytest-xdist is: most of the time goes into compiling.
ON_DEVICE := $(addprefix tests/test_,$(addsuffix .py,warmup triton_device prompt_attention_library diffuse_prompts \
key_scores compress_kv summarize_tokens))
gpu-test: installed
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)
	$(PYTHON) -m pytest -m "not gpu" $(ON_DEVICE) tests/test_*_triton.py $(PYTEST_ARGS)

# Every Triton kernel once under NVIDIA's compute-sanitizer. Each tensor is an allocation of its own, so that a step
# beyond one is seen.
SANITIZER := compute-sanitizer --error-exitcode 1
sanitize-gpu: installed
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer: not on the PATH; it comes with the CUDA \
	toolkit (/usr/local/cuda/bin)" >&2; exit 1; }
	failed=; for tool in memcheck racecheck initcheck; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(PYTHON) -m pytest -q -p no:cacheprovider --timeout=0 \
	tests/test_sanitized.py $(PYTEST_ARGS) || failed="$$failed $$tool"; done; \
	test -z "$$failed" || { echo "compute-sanitizer: failed in$$failed" >&2; exit 1; }

# Into bench/results/GPU-DATE.jsonl: ceilings, a sample of the tests, what bench/targets.py aims at, then all tests and
# cases. MINUTES=8 stops there (exit status 75), and the same command goes on; CASES="decode ..." measures these alone.
bench-gpu: installed
	$(PYTHON) -m bench.suite --device cuda $(if $(MINUTES),--minutes $(MINUTES)) $(CASES)

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
	rm -f bench/results/*-cpu.jsonl
	$(MAKE) bench

# Every case of bench/suite.py on the CPU; what its results files hold already is not measured again.
bench: $(VENV)/.dev
	$(BIN)/python -m bench.suite
	$(BIN)/python -m bench.roofline --device cpu --json bench/results/ceilings-cpu.jsonl
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
