# `make demo` and `make test` need nothing but python3 >= 3.11: each sets up its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# Two processes of one thread each: half the time on two cores, and torch's threads do not compete.
WORKERS ?= 2
WORKER = $(WORKERS)*popen//python=$(BIN)/python tests/worker.py
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist worksteal --tx "$(WORKER)"

TRITON ?= 3.6.0
RESULTS ?= gpu-results

.PHONY: demo test test-fast lint types bench compile-gate gpu-check cluster-check machines-check clean

demo: $(INSTALLED)
	$(BIN)/slm demo

test: $(INSTALLED) lint types
	$(PYTEST)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyrefly check

bench: $(INSTALLED)
	$(BIN)/python experiments/benchmarks/pipeline.py

# What the kernels compile to under another Triton: spills, tensor cores, shared memory.
compile-gate: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(VENV)/triton-$(TRITON) $(BIN)/python kernels/benchmarks/compiled.py

# On a machine with a GPU, torch and triton: no environment of its own. Under nine minutes; the kernels
# of the tests are compiled in several processes.
gpu-check:
	mkdir -p $(RESULTS)
	PYTHONPATH=kernels:. $(PYTHON) -m pytest tests/kernels -m "not slow" -n 8 --junitxml=$(RESULTS)/tests.xml
	PYTHONPATH=kernels $(PYTHON) kernels/benchmarks/bench.py --out $(RESULTS)/bench.csv

# As root in a container of Debian: a Slurm of two nodes on this machine, and what runs under it.
CLUSTER ?= /tmp/slm-cluster
cluster-check: $(INSTALLED) $(VENV)/machines
	tests/cluster/slurm.sh start $(CLUSTER)
	OMP_NUM_THREADS=1 SLURM_CONF=$(CLUSTER)/slurm.conf $(BIN)/python -m pytest tests/cluster; \
		code=$$?; tests/cluster/slurm.sh stop $(CLUSTER); exit $$code

# slm prepare as a step of datatrove and on actors of Ray, on this machine.
machines-check: $(INSTALLED) $(VENV)/machines
	$(BIN)/python -m pytest tests/cluster/test_machines.py

$(VENV)/machines: tests/cluster/machines.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ -r $<
	touch $@

$(INSTALLED): pyproject.toml constraints.txt tests/doors.txt tests/readers.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python >= 3.11 is needed, $(PYTHON) is {v.major}.{v.minor}")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/doors -r tests/doors.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/readers -r tests/readers.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache demo
