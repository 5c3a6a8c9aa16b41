# Every command of the project. `make help` lists them; only `make setup` needs a network.

PYTHON ?= python3
# Added to the command of `make test`, e.g. `make test ARGS="-k ties -x"`.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The demo's networks are so small that several threads wait for each other more than they compute.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

# Nothing that runs from here phones home, and nothing that it loads from MLflow is unpickled.
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint ui clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv and install everything at the versions of constraints.txt

# The stamp is written last: an interrupted set-up is done again, a finished one is not.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[workshop,dev]'
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: '$(PYTHON)' was not found. Name a Python >= 3.11:" \
	         "make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: metamerge needs Python >= 3.11 and '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	         "Name a newer one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' cannot make virtual environments" \
	         "(on Debian: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

demo: $(STAMP) ## train a small merger, then compare it with everything else (minutes on a CPU)
	$(ONE_THREAD) $(BIN)/accelerate launch --config_file accelerate_config.yaml trainers/merger.py
	$(ONE_THREAD) $(BIN)/python -m evaluation.compare

# Two workers of one thread each; a file stays on one worker, so what its fixtures built is built once.
# tests/conftest.py says which files come first.
test: $(STAMP) ## run the tests and the examples in the docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## check rules and format, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

ui: $(STAMP) ## browse the runs that were tracked, on http://127.0.0.1:5000
	@test -f mlflow.db || { \
	    echo "error: there is no mlflow.db here yet. Run 'make demo', or a trainer, from this folder first." >&2; exit 1; }
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui \
	    --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

clean: ## remove caches and build outputs; keeps .venv, zoos, runs and mlflow.db
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find metamerge zoo trainers evaluation tests -name __pycache__ -type d -prune -exec rm -rf {} +
