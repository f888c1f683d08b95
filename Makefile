# Every target makes .venv first when it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Two processes, each of which takes whole files, since files share fixtures that cost much.
PYTEST := .venv/bin/pytest --numprocesses 2 --dist loadfile
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup packages demo test test-slow test-long check pictures bench format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up .venv (7 GB on disk)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $(STAMP)

setup: $(STAMP)  ## install the project and its tools into .venv

packages:  ## install the Debian packages that some tests need (as root); those in .ci/packages.txt
	@.ci/packages

demo: $(STAMP)  ## the whole pipeline on generated videos: shards, search, training, report, MLflow
	$(BIN)/sagsm run demo

test: $(STAMP)  ## the tests, without the slow ones (under 12 minutes on 2 cores)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)  ## faults, clusters, browser and end-to-end runs (half an hour to one and a half on 2 cores)
	$(PYTEST) -m "slow and not long"

test-long: $(STAMP)  ## the pipeline on hosts in network namespaces, real dives learned (as root, half an hour)
	$(BIN)/pytest -m long

check: $(STAMP)  ## ruff, format, types, import rules, tests: what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow"

pictures: demo  ## make the pictures of infra/TRACKING.md anew, from the demo in work/ and a browser
	SAGSM_DEMO=work SAGSM_SCREENSHOTS=infra/pictures $(BIN)/pytest tests/end_to_end/test_browser.py

bench: $(STAMP)  ## measure shards, loader, networks, evaluation and search against their baselines
	$(BIN)/python tests/benchmarks/bench_shards.py
	$(BIN)/python tests/benchmarks/bench_loader.py
	$(BIN)/python tests/benchmarks/bench_models.py
	$(BIN)/python tests/benchmarks/bench_evaluation.py
	$(BIN)/python tests/benchmarks/bench_search.py

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; work/ (artifacts, MLflow) stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
