# Everything runs in .venv, which whatever target comes first sets up: python3 (3.10 to 3.12, with venv) and make will do.
# Another interpreter: make PYTHON=python3.11 ...

PYTHON ?= python3
SHELL := bash
export PIP_DISABLE_PIP_VERSION_CHECK = 1
INSTALLED := .venv/installed

.PHONY: help setup demo test study-smoke docs lint types check format clean

help:
	@echo 'make demo    train a small network with SBA on handwritten digits'
	@echo 'make test    run all tests'
	@echo 'make study-smoke  train every method on the digits and write the report, in minutes'
	@echo 'make docs    build the documentation, docs/_build/html/index.html'
	@echo 'make lint    check style and format'
	@echo 'make types   check types'
	@echo 'make check   lint, types and test'
	@echo 'make format  correct style and format'
	@echo 'make setup   set up for development, with the checks before each commit'
	@echo 'make clean   remove what the tools leave behind, not .venv, data or runs'

# One environment for demo and development: beside the 6 GB of PyTorch the tools of the latter weigh nothing.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
		{ echo "composer-sba needs Python 3.10, 3.11 or 3.12, and '$(PYTHON)' is none: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo 'Setting up .venv: PyTorch, Composer and Streaming, up to 6 GB and a few minutes, once.'
	@$(PYTHON) -m venv .venv
	@set -o pipefail; .venv/bin/pip install --editable '.[dev]' \
		| awk '/ MB\)|^Installing|^Successfully/ { print "  " substr($$0, 1, 110); fflush() }'
	@touch $@

setup: $(INSTALLED)
	.venv/bin/pre-commit install

demo: $(INSTALLED)
	.venv/bin/composer train.py -f yamls/digits_sba.yaml
	@echo 'Next: docs/tutorials/digits.md says what the lines mean; .venv/bin/composer train.py -f yamls/digits_baseline.yaml'
	@echo 'trains the same without SBA. In a script of your own SBA() is one line: README.md.'

test: $(INSTALLED)
	.venv/bin/python -m pytest --durations=10

study-smoke: $(INSTALLED)
	.venv/bin/python -m composer_sba.study rivals --datasets digits --seeds 2 --jobs 2 --epochs-scale 0.25 \
		--results runs/study-smoke --set train_dataset.in_memory=true eval_dataset.in_memory=true
	.venv/bin/python -m composer_sba.study report --results runs/study-smoke --page runs/study-smoke/report.md

docs: $(INSTALLED)
	@.venv/bin/python -c 'import furo, myst_nb, sphinx_copybutton' 2>/dev/null || \
		.venv/bin/pip install --quiet --editable '.[docs]'
	.venv/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html

lint: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: $(INSTALLED)
	.venv/bin/mypy

check: lint types test

format: $(INSTALLED)
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache docs/_build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
