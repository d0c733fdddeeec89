# `make demo` and `make test` each stand alone on a fresh clone. Every step leaves a stamp named by a hash of what it read,
# so a second call does only what has changed. Nothing outside this folder is written; `make clean` takes it all away.
#
#   PYTHON=python3.11   the interpreter that .venv is made from (3.10 or newer)
#   JOBS=2              compilers and test processes at once

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
PY := $(VENV)/bin/python
BUILD_FLAGS := LOWMEM_SKIP_BUILD FORCE_CUDA CUDA_HOME TORCH_CUDA_ARCH_LIST NVCC_THREADS CXX

digest = $(shell cat $(1) 2>/dev/null | sha256sum | cut -c1-16)
DEPS := $(VENV)/.stamps/deps-$(call digest,constraints.txt requirements.txt)
LINK := $(VENV)/.stamps/link-$(call digest,pyproject.toml setup.py)
CSRC := $(shell find csrc -name _template -prune -o -type f -print | LC_ALL=C sort)
LIBS := $(VENV)/.stamps/libs-$(shell { cat setup.py $(CSRC); echo $(foreach v,$(BUILD_FLAGS),$(v)=$($(v))); echo $(DEPS); } | sha256sum | cut -c1-16)

say = @echo "== $(1)"

.PHONY: help demo test build check-libs test-cpu test-interpret test-compile test-emulate test-compat gpu gpu-pack sanitize bench lint format docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 24

# ------------------------------------------------------------------------------------------------------------- set-up

$(DEPS):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "PYTHON=$(PYTHON): constraints.txt needs Python 3.11 or newer"; exit 1; }
	$(call say,set-up: $(VENV) and the packages that constraints.txt pins (the first time: some minutes, most of it torch))
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt
	@mkdir -p $(@D) && rm -f $(@D)/deps-* && touch $@

$(LINK): | $(DEPS)
	$(call say,set-up: this folder as an editable install)
	@LOWMEM_SKIP_BUILD=1 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e . 2>/dev/null
	@rm -f $(@D)/link-* && touch $@

# An operator library that is missing although its stamp is there (make clean, git clean) is built again.
ifeq ($(wildcard lowmem/_C.*so),)
.PHONY: $(LIBS)
endif
$(LIBS): | $(LINK)
	$(call say,build: the operator libraries of csrc/ (only what changed))
	@mkdir -p build && MAX_JOBS=$${MAX_JOBS:-$(JOBS)} $(PY) setup.py -q build_ext --inplace > build/log.txt 2>&1 || { tail -n 60 build/log.txt; echo "build failed: the whole log is build/log.txt"; exit 1; }
	@grep -h '^lowmem: ' build/log.txt || true
	@rm -f $(@D)/libs-* && touch $@

build: $(LIBS) ## the virtual environment and the operator libraries
	@$(PY) -c "import lowmem; print(lowmem.backends())"

# --------------------------------------------------------------------------------------------------------- what it does

demo: $(LIBS) ## the main job: fine-tune a small Llama with PEFT and with lowmem, and compare
	$(call say,demo: examples/finetune.py)
	@$(PY) examples/finetune.py $(ARGS)

test: $(LIBS) ## lint, then every test that needs no GPU
	@$(PY) tools/run_tests.py --jobs $(JOBS)

test-cpu: $(LIBS) ## the tests that run in one plain pytest process
	@$(PY) tools/run_tests.py --jobs $(JOBS) cpu

test-interpret: $(LIBS) ## Triton kernels in the interpreter
	@$(PY) tools/run_tests.py --jobs $(JOBS) interpret

test-emulate: $(LIBS) ## CUDA C++ kernels executed on the CPU
	@$(PY) tools/run_tests.py --jobs $(JOBS) emulate

test-compile: $(LIBS) ## every kernel compiled for every GPU target, against its budget; the full matrix
	@LOWMEM_COMPILE_FULL=1 $(PY) tools/run_tests.py --jobs $(JOBS) compile

test-compat: $(LIBS) ## the built libraries and the tests on the oldest torch and triton that are served (downloads gigabytes)
	$(call say,compat: .venv-compat with the packages of constraints-compat.txt)
	@test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	@.venv-compat/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-compat.txt -r requirements.txt
	@.venv-compat/bin/python tools/run_tests.py --jobs $(JOBS) cpu interpret

gpu: $(LIBS) ## the same tests on a CUDA device, then the benchmarks there
	$(call say,gpu: bench/gpu_run.py)
	@$(PY) bench/gpu_run.py $(ARGS)

gpu-pack: $(LIBS) ## one folder with what a bare GPU machine needs: libraries, peers to compare with; checked
	@$(PY) tools/gpu_pack.py $(ARGS)

sanitize: $(LIBS) ## the GPU tests under compute-sanitizer
	@command -v compute-sanitizer >/dev/null || { echo "sanitize: compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)"; exit 1; }
	compute-sanitizer --tool memcheck --error-exitcode 9 $(PY) -m pytest -q -m gpu tests
	compute-sanitizer --tool racecheck --error-exitcode 9 $(PY) -m pytest -q -m gpu tests

bench: $(LIBS) ## the benchmarks of this machine's CPU (or GPU)
	@for file in bench/bench_*.py; do echo "== bench: $$file"; $(PY) $$file $(ARGS); done

lint: $(DEPS) ## ruff, clang-format and mypy
	@$(PY) tools/run_tests.py lint

format: $(DEPS) ## rewrite the sources as ruff and clang-format want them
	@$(PY) tools/run_tests.py --fix lint

docs: $(LIBS) ## check that every path, target and flag that the pages name exists
	@$(PY) tools/check_docs.py

clean: ## what make made: environments, libraries, caches
	rm -rf .venv .venv-compat build dist *.egg-info lowmem/_C*.so lowmem/_host*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
