# `make parity` is all that a newcomer needs: it makes .venv, installs the tested versions, runs the default parity run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup parity test lint format isolation train doctor clean distclean

help:  ## say what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST)

parity: $(STAMP)  ## judge the twins: the default parity run (ARGS='--only logits' and the like)
	@$(BIN)/parity run $(ARGS)

# A worker for each core, four at most: one takes up to 3 GB.
test: $(STAMP)  ## run the tests but the long ones (ARGS='tests/parity -k verdict', '-m long', '-n 0' and the like)
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder -m "not long" $(ARGS)

lint: $(STAMP)  ## ruff (rules and format) and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(STAMP)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

isolation: $(STAMP)  ## import and run each twin in a bare environment without the other's framework
	@$(BIN)/python tests/repo/isolation.py

train: $(STAMP)  ## train the shipped ThinkerLM again, from the seed
	@$(BIN)/python scripts/train_shipped.py $(ARGS)

doctor: $(STAMP)  ## say what this machine has and what would spoil a run
	@$(BIN)/parity doctor

setup: $(STAMP)  ## make .venv and install only

# python3 -m venv needs Debian's python3-venv; without it the system's pip fills an environment that has no pip.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) on this machine; say which to use: make parity PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import platform, sys; sys.exit(sys.version_info < (3, 11) and "omni-parity needs Python 3.11 or newer; $(PYTHON) is " + platform.python_version() + ". Say which to use: make parity PYTHON=python3.12")'
	@if ! $(BIN)/python -c '' 2>/dev/null; then \
		rm -rf $(VENV); \
		echo "making $(VENV)"; \
		$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV); }; \
	fi
	@echo "installing the tested versions into $(VENV) (once; a few minutes)"
	@pip="$(BIN)/python -m pip"; $$pip --version >/dev/null 2>&1 || pip="$(PYTHON) -m pip --python $(BIN)/python"; \
		$$pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove caches and build leftovers
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .cache
	find omni_jax omni_torch parity tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments too
	rm -rf $(VENV) .venvs
