# Every target sets up .venv by itself when it is needed. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# One thread per process: the models are tiny, and a second thread would only wait for the first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# One process per core, each with a share of the tests; what a process has left over goes to those that are done.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

.PHONY: help demo test test-learning-avx2 test-vllm test-ray test-fast lint bench bench-learning

help:
	@echo "make demo       the whole story on a CPU, offline, in minutes"
	@echo "make test       the whole test suite"
	@echo "make test-learning-avx2"
	@echo "                the tests that ask for learning, with the kernels of a CPU without AVX-512"
	@echo "make test-vllm  the tests that ask vLLM, which is set up first in an environment of its own: gigabytes, once"
	@echo "make test-ray   the tests that ask Ray, which is installed first"
	@echo "make test-fast  arithmetic, data and config: under a minute"
	@echo "make lint       ruff (format and lint) and mypy"
	@echo "make bench-learning  the demo in eight towns on two CPU paths, with ranges: hours; runs that are done are kept"
	@echo "make bench      speed beside other libraries; MODEL=DIR of stories260K for the race"

demo: $(READY)
	$(BIN)/tether demo

test: $(READY)
	$(PYTEST) $(PARALLEL)

# Rounding differs between CPUs, and training carries it on: what is learned must not depend on it.
test-learning-avx2: $(READY)
	ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m learning $(PARALLEL)

# A start of vLLM takes one core half a minute: each file has its own processes.
test-vllm: $(READY)
	bench/peers/setup.sh vllm
	TETHER_TEST_VLLM=1 $(PYTEST) tests/vllm -n logical --maxprocesses 2 --dist loadfile

# Workers are processes of their own, which fill the cores: one test at a time.
test-ray: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,ray]"
	TETHER_TEST_RAY=1 $(PYTEST) tests/pool

test-fast: $(READY)
	$(PYTEST) tests/math tests/data tests/config

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The other libraries are set up first, each in an environment of its own: minutes and gigabytes, once.
bench: $(READY)
	bench/peers/setup.sh
	$(BIN)/python bench/sampling.py --rounds 3
	$(BIN)/python bench/cycle.py --rounds 3
	$(if $(MODEL),$(BIN)/python bench/race.py --model $(MODEL) --seeds 0 1 2,@echo "no race: say MODEL=DIR")

bench-learning: $(READY)
	$(BIN)/python bench/demo.py

# torch first, alone: pip then settles everything else around the build that it found
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@
