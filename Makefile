# make demo: compare the methods on real digits.  make test: run all tests.  Both need only Python 3.10 to 3.13.
# make test-long: the matrix of set-ups on several processes, and every preset, which CI runs too.
# make docs: write the documentation site into site/; a link that leads nowhere is an error.
# make bench: set detente beside its peers, in an environment of its own (see benchmarks/README.md).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# two threads under contention are many times slower than one
export OMP_NUM_THREADS := 1

.PHONY: demo test test-long lint docs bench bench-agreement bench-solvers bench-aggregation bench-steps bench-memory bench-distributed bench-driver bench-disjoint bench-sac clean

demo: .venv/compare
	$(BIN)/detente compare digits --out runs/demo

test: .venv/dev
	$(BIN)/python -m pytest -m "not long" --numprocesses auto --dist loadfile

test-long: .venv/dev
	$(BIN)/python -m pytest -m long tests

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate.py --check
	$(BIN)/python scripts/pages.py --check

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/python:
	$(PYTHON) -m venv .venv
	touch $@

# torch first and alone: with it installed, nothing else asks for another build
.venv/torch: .venv/python constraints.txt
	$(PIP) torch==2.13.0
	touch $@

.venv/compare: .venv/torch pyproject.toml
	$(PIP) --editable ".[compare]"
	touch $@

# LibMTL, for the migration pages, asks for torchvision, which it does not need here
.venv/dev: .venv/torch pyproject.toml
	$(PIP) --editable ".[compare,dev]"
	$(PIP) --no-deps LibMTL==1.1.5
	touch $@

.venv/docs: .venv/torch pyproject.toml
	$(PIP) --editable ".[docs]"
	touch $@

# the peer library and its solvers, which detente itself never needs
BENCH := benchmarks/.venv/bin/python
BENCH_PIP := $(BENCH) -m pip install --quiet --disable-pip-version-check --constraint benchmarks/constraints.txt

bench: bench-agreement bench-solvers bench-aggregation bench-steps bench-memory bench-distributed

bench-agreement: benchmarks/.venv/ready
	$(BENCH) benchmarks/agreement.py

bench-solvers: benchmarks/.venv/ready
	$(BENCH) benchmarks/solvers.py

bench-aggregation: benchmarks/.venv/ready
	$(BENCH) benchmarks/aggregation.py

bench-steps: benchmarks/.venv/ready
	$(BENCH) benchmarks/steps.py
	$(BENCH) benchmarks/picture.py

bench-memory: benchmarks/.venv/ready
	$(BENCH) benchmarks/memory.py

bench-distributed: benchmarks/.venv/ready
	$(BENCH) benchmarks/distributed.py

# needs no peer
bench-driver: .venv/compare
	$(BIN)/python benchmarks/driver.py

# the second time as docs/speed.md has it
bench-disjoint: .venv/compare
	$(BIN)/python benchmarks/disjoint.py
	MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 \
		$(BIN)/python benchmarks/disjoint.py --name disjoint-kept.md

# needs no peer, but Meta-World
bench-sac: .venv/dev
	$(BIN)/python benchmarks/sac.py

benchmarks/.venv/ready: benchmarks/constraints.txt
	$(PYTHON) -m venv benchmarks/.venv
	$(BENCH_PIP) torch==2.13.0
	$(BENCH_PIP) "torchjd[full]" numpy scipy matplotlib conflictfree numba
	$(BENCH_PIP) --no-deps LibMTL
	$(BENCH) -c "import torch; assert torch.__version__.startswith('2.13.0'), torch.__version__"
	$(BENCH_PIP) --no-deps --editable .
	touch $@

clean:
	rm -rf .venv benchmarks/.venv
