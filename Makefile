# `make demo` and `make test` need nothing but python3 >= 3.11: each sets up its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-fast lint types bench clean

demo: $(INSTALLED)
	$(BIN)/slm demo

test: $(INSTALLED) lint types
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/basedpyright

bench: $(INSTALLED)
	$(BIN)/python experiments/benchmarks/pipeline.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python >= 3.11 is needed, $(PYTHON) is {v.major}.{v.minor}")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache demo
