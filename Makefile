# All targets run in .venv. The first one creates it; this needs python3 (3.10 to 3.12) with venv.
# To choose an interpreter: make PYTHON=python3.11 ...

PYTHON ?= python3
SHELL := bash
export PIP_DISABLE_PIP_VERSION_CHECK = 1
INSTALLED := .venv/installed
CAMPAIGN ?= 50
# Three workers on two cores took longer, and 100 s more of CPU time
WORKERS ?= $(shell nproc)

.PHONY: help setup demo test test-nightly study-smoke docs docs-environment lint types check format clean

help:
	@echo 'make demo    train a small network with SBA on handwritten digits'
	@echo 'make test    run the tests, in minutes'
	@echo 'make test-nightly  run all tests, with campaigns of kills and odd arguments: CAMPAIGN=50 for their size'
	@echo 'make study-smoke  train every method on the digits and write the report, in minutes'
	@echo 'make docs    build the documentation, docs/_build/html/index.html'
	@echo 'make lint    check style, format and the direction of imports'
	@echo 'make types   check types'
	@echo 'make check   lint, types and test'
	@echo 'make format  correct style and format'
	@echo 'make setup   set up for development and install the pre-commit hooks'
	@echo 'make clean   remove build products and caches; keep .venv, data and runs'

# The demo and development share one environment: the development tools are small next to the 6 GB of PyTorch.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
		{ echo "composer-sba needs Python 3.10, 3.11 or 3.12, not '$(PYTHON)': try make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo 'Installing PyTorch, Composer and Streaming into .venv: up to 6 GB, a few minutes, once.'
	@$(PYTHON) -m venv .venv
	@set -o pipefail; .venv/bin/pip install --editable '.[dev]' \
		| awk '/ MB\)|^Installing|^Successfully/ { print "  " substr($$0, 1, 110); fflush() }'
	@touch $@

setup: $(INSTALLED)
	.venv/bin/pre-commit install

demo: $(INSTALLED)
	.venv/bin/composer-sba train -f digits_sba.yaml save_overwrite=true
	@echo 'Next, for the commands above: source .venv/bin/activate'
	@echo 'docs/tutorials/digits.md explains this output.'
	@echo 'Train without SBA: composer-sba train -f digits_baseline.yaml'

test: $(INSTALLED)
	.venv/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10

test-nightly: $(INSTALLED)
	.venv/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 10 -m '' --campaign $(CAMPAIGN)

study-smoke: $(INSTALLED)
	.venv/bin/python -m composer_sba.study methods --datasets digits --seeds 2 --jobs 2 --epochs-scale 0.25 \
		--results runs/study-smoke --set train_dataset.in_memory=true eval_dataset.in_memory=true
	.venv/bin/python -m composer_sba.study report --results runs/study-smoke --page runs/study-smoke/report.md

docs-environment: $(INSTALLED)
	@.venv/bin/python -c 'import furo, myst_nb, sphinx_copybutton' 2>/dev/null || \
		.venv/bin/pip install --quiet --editable '.[docs]'

docs: docs-environment
	.venv/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html

lint: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports --no-cache

types: $(INSTALLED)
	.venv/bin/mypy

check: lint types test

format: $(INSTALLED)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache docs/_build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
