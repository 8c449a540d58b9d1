# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
DEMO_DIR ?= demo

# One compute thread a test worker: OpenMP threads that spin beside each other make everything ten times slower.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test lint format setup clean

demo: setup
	rm -rf $(DEMO_DIR)
	$(BIN)/sparse-rt demo -o $(DEMO_DIR)

test: setup lint
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(READY): pyproject.toml .ci/setup
	PYTHON=$(PYTHON) .ci/setup $(VENV)
	touch $(READY)

clean:
	rm -rf $(VENV) $(DEMO_DIR) build dist *.egg-info
