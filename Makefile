# make demo       the main job: a small Llama through the compiler, its report, errors and times
# make test       everything that needs no GPU: style, types, tests
# make gpu-test   the tests that need a CUDA device
# make bench      the benchmark tables (BENCH_FLAGS=--tiny for a quick look, JSON=folder to keep the figures)
# make format     put the sources in the style that `make test` asks for
#
# PYTHON=python3.12 chooses the interpreter of the environment. Where torch is already installed and nothing can be
# fetched, VENV=none uses that interpreter as it is, with the checkout on PYTHONPATH.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
JSON ?= build/bench
BENCH_FLAGS ?=
PYTEST_FLAGS ?=

ifeq ($(VENV),none)
export PYTHONPATH := $(CURDIR)
RUN := $(PYTHON)
READY :=
else
RUN := $(CURDIR)/$(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test lint types gpu-test bench format install clean
.DEFAULT_GOAL := test

install: $(READY)

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fusion_compiler needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(READY)
	$(RUN) -m benchmarks.demo

test: lint types
	$(RUN) -m pytest -n $(JOBS) -m 'not gpu' $(PYTEST_FLAGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Type checkers do not follow package-dir, so the three folders are linked together as they install.
types: $(READY)
	rm -rf build/types && mkdir -p build/types/fusion_compiler
	ln -s $(CURDIR)/fusion_compiler/* $(CURDIR)/patterns $(CURDIR)/lowering build/types/fusion_compiler/
	cd build/types && $(RUN) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fusion_compiler

gpu-test: $(READY)
	FUSION_COMPILER_TEST_GPU=1 $(RUN) -m pytest -m gpu $(PYTEST_FLAGS)

bench: $(READY)
	mkdir -p $(JSON)
	for table in gated_mlp attention llama rows linears; do \
	    $(RUN) -m benchmarks.$$table --json $(JSON)/$$table.json $(BENCH_FLAGS) || exit 1; \
	done

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf build dist *.egg-info
