# SPDX-License-Identifier: BSD-3-Clause
# `make demo` and `make test` need Python 3.11, a C++20 compiler and pip. The Python used is the
# active one if it has torch, else .venv, which they make. PYTHON=... chooses another; TORCH=... is
# what pip installs into .venv.
VENV := .venv
TORCH ?= torch>=2.11
PYTHON ?= $(shell for p in python python3; do \
  $$p -c 'import sys; from importlib.util import find_spec as f; sys.exit(not f("torch"))' \
  2>/dev/null && { command -v $$p; exit; }; done; echo $(CURDIR)/$(VENV)/bin/python)
PYTHON3 ?= python3
WORKERS ?= 2
NEEDS = $(PYTHON) .ci/install_extra.py
CLANG_FORMAT = $(PYTHON) -c 'from clang_format import clang_format as run; run()'

.PHONY: help python build test test-gpu sanitize test-cpp kernels lint format demo bench clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## */ - /'

$(VENV)/has_torch:
	$(PYTHON3) -m venv $(VENV)
	$(VENV)/bin/python -m pip install "$(TORCH)"
	touch $@

python: $(if $(findstring $(CURDIR)/$(VENV),$(PYTHON)),$(VENV)/has_torch)
	@echo "Python: $$($(PYTHON) -c 'import sys, torch; print(sys.executable, "with torch", torch.__version__)')"

build: python ## build flash_attn._C in place
	@$(NEEDS) build
	@$(PYTHON) .ci/choose_cuda.py --explain
	FLASH_ATTN_CUDA=$$($(PYTHON) .ci/choose_cuda.py) $(PYTHON) setup.py -q build_ext --inplace

test: build ## every test that this machine can run
	@$(NEEDS) test
	$(PYTHON) -m pytest -q -n $(WORKERS) $(TESTS)

test-gpu: python ## the grid of cases on a GPU; results in build/test-gpu.json
	@$(NEEDS) build gpu
	FLASH_ATTN_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -q -n auto --maxprocesses 14 tests/backends -k "not cpu" \
	  --json build/test-gpu.json $(TESTS)

sanitize: python ## memcheck, synccheck and racecheck of the sm90 kernels, in a build for them
	@$(NEEDS) build gpu
	FLASH_ATTN_CUDA=1 FLASH_ATTN_SANITIZE=1 $(PYTHON) setup.py -q build_ext --inplace
	for tool in memcheck synccheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $$tool --kernel-name kns=flash --error-exitcode 1 \
	  $(PYTHON) tests/sanitize.py $(CASES) || exit 1; done
	@echo "flash_attn._C is now the build for sanitizers; 'make build' replaces it"

test-cpp: ## C++ tests of the layers below torch
	$(PYTHON3) csrc/build_kernels.py tests $(if $(CUDA),--cuda)

kernels: ## compile the CUDA backend alone; spills fail
	$(PYTHON3) csrc/build_kernels.py kernels

lint: python ## formatters, linters, types
	@$(NEEDS) lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m benchmarks.report --check
	git ls-files '*.h' '*.cpp' '*.cuh' '*.cu' | xargs $(CLANG_FORMAT) --dry-run -Werror

format: python ## let the formatters write
	@$(NEEDS) lint
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	git ls-files '*.h' '*.cpp' '*.cuh' '*.cu' | xargs $(CLANG_FORMAT) -i

demo: build ## train a small GPT three ways; plots in demo_output/
	@$(NEEDS) demo
	PYTHONPATH=. $(PYTHON) examples/train_gpt.py $(DEMO)

bench: build ## python -m benchmarks.bench
	@$(NEEDS) demo
	$(PYTHON) -m benchmarks.bench $(BENCH)

clean:
	rm -rf build flash_attn/_C*.so flash_attn/_build_info.py
