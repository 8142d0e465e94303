# solvus: set up, run, test. `make run` and `make test` need only git, make and Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# cpu, cuda, or auto: a CUDA build where an NVIDIA driver answers, the small CPU build elsewhere.
TORCH ?= auto

.PHONY: run test setup check format test-slow test-gpu chaos browser test-pages bench docs constraints clean

run: setup
	$(BIN)/solvus run study=quickstart cluster=ray

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not chaos"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh scripts/setup.sh $(VENV)
	touch $(STAMP)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: setup
	$(BIN)/python -m pytest -m "slow"

test-gpu: setup
	$(BIN)/python -m pytest -m "gpu"

chaos: setup
	$(BIN)/solvus chaos
	$(BIN)/python -m pytest -m "chaos"

browser: setup
	$(BIN)/python -m pytest tests/orchestrator/test_report_browser.py

test-pages: setup
	$(BIN)/python -m pytest -m slow tests/orchestrator/test_mlflow_pages.py tests/orchestrator/test_telemetry.py

bench: setup
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.solvers --part overhead
	$(BIN)/python -m benchmarks.solvers --part published
	$(BIN)/python -m benchmarks.search --part overhead --quick
	$(BIN)/python -m benchmarks.metrics --quick
	$(BIN)/python -m benchmarks.pipelines
	$(BIN)/python -m benchmarks.report

docs: setup
	$(BIN)/python scripts/methods.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

constraints: setup
	( echo "# What continuous integration runs with. Regenerate with: make constraints"; \
	  $(BIN)/pip freeze --exclude-editable | sed 's/+cpu//; s/+cu[0-9]*//' | grep -v -i -E '^(solvus|nvidia|triton|cuda)' ) > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
