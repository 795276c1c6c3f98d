# Every target works from a fresh clone: what it needs, it installs into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

PYTEST = $(BIN)/pytest --durations=40
# Two at a time, the longest first: whichever ends takes up the next.
TWO := $(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target
TESTS := test-processes test-others lane-interpreter lane-emulator
# What runs only where its inputs differ from those that it passed with, see tools/lanes.py.
LANE_TESTS := tests/kernels/test_compiled_cuda.py tests/kernels/test_triton_interpreted.py

# Processes that tests start would compile every module of the project again.
export PYTHONDONTWRITEBYTECODE :=

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: install demo test test-processes test-others lanes ci fuzz lint format type bench kernels-aot clean

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is compiled against the torch it will run with.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet "torch>=2.10" "setuptools>=80" ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/erasediff demo $(ARGS)

test: install
ifeq ($(ARGS),)
	$(TWO) $(TESTS)
else
	$(PYTEST) $(ARGS)
endif

test-processes:
	$(PYTEST) tests/distributed

test-others:
	$(PYTEST) tests --ignore=tests/distributed $(addprefix --ignore=,$(LANE_TESTS))

# Left out, with a line that says so, where .ci/green has its inputs; CI_FULL=1 runs it.
lane-%:
	MAKEFLAGS= $(BIN)/python tools/lanes.py $*

lanes: install
	$(TWO) lane-aot lane-interpreter lane-emulator

ci: install
	$(TWO) $(TESTS) lane-aot type lint

# New inputs for an hour, or as FUZZ_SECONDS says; those that fail are kept in .fuzz and come first the next time.
fuzz: install
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),3600) $(BIN)/pytest tests/fuzz $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: install
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/kernels/run.py $(ARGS)

# What compilers make of the GPU kernels, on a machine without a GPU: no spills, no local memory, 128-bit accesses.
kernels-aot: install
	$(BIN)/python tools/aot_triton.py
	$(BIN)/python tools/aot_cuda.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info engine/*.egg-info
