# Every target works from a fresh clone: what it needs, it installs into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: install demo test test-processes test-others lint format type bench kernels-aot clean

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

# Those that start processes spend much of their time waiting: the others run beside them, and then AFTER, if given.
test: install
ifeq ($(ARGS),)
	$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target test-processes test-others
else
	$(BIN)/pytest $(ARGS)
endif

test-processes:
	$(BIN)/pytest tests/distributed

test-others:
	$(BIN)/pytest tests/unit tests/e2e tests/kernels
	$(if $(AFTER),$(MAKE) --no-print-directory $(AFTER))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
