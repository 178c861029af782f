# `make run` and `make test` do all the set-up they need, in .venv. Use another Python with PYTHON=python3.12.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
# Processes that run tests, one thread each.
JOBS ?= 2
# Compiled files are kept, also where the environment says otherwise: tests start many processes.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.PHONY: run test test-unit test-versions test-processors figures gpu fullsize lint soak docs clean

run: $(VENV)/.core
	$(PY) -m fluxlab.run +exp=article

test: $(VENV)/.dev
	$(PYTEST) tests/unit tests/numerics tests/integration tests/gpu -m "not soak"

test-unit: $(VENV)/.dev
	$(PYTEST) tests/unit

test-versions:
	PYTHON=$(PYTHON) tests/versions.sh

test-processors: $(VENV)/.dev
	PYTHON=$(PY) tests/processors.sh

# Every figure, from its runs to figures/. One of them, or another model: make figures FIGURES="steps model=schnell"
figures: $(VENV)/.core
	$(PY) -m experiments.every $(FIGURES)

# On a machine with a card, at most 10 minutes. Other options: make gpu GPU="--budget 240 --parts forward"
gpu: $(VENV)/.dev
	$(PY) -m benchmarks.gpu $(GPU)

# FLUX.1-dev of random weights at its real size, within 6 GB of memory; 34 GB of disk.
fullsize: $(VENV)/.dev
	$(PY) -m benchmarks.fullsize $(if $(MODEL),--model $(MODEL)) $(FULLSIZE)

soak: $(VENV)/.dev
	$(PY) -m pytest tests -m soak

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

docs: $(VENV)/.dev
	$(PY) docs/tables.py
	$(PY) docs/architecture.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=<a newer one>")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(PY)
	@echo "installing fluxlab and its dependencies into $(VENV) (a few minutes the first time)"
	$(PY) -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(PY)
	@echo "installing fluxlab with its development tools into $(VENV) (a few minutes the first time)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV) runs dist build
