# make demo: compare the methods on real digits.  make test: run all tests.  Both need only Python 3.10 to 3.13.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# two threads under contention are many times slower than one
export OMP_NUM_THREADS := 1

.PHONY: demo test lint clean

demo: .venv/compare
	$(BIN)/detente compare digits --out runs/demo

test: .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate.py --check

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

.venv/dev: .venv/torch pyproject.toml
	$(PIP) --editable ".[compare,dev]"
	touch $@

clean:
	rm -rf .venv
