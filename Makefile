# demo, test, test-all, test-gpu, check and docs; each first makes its own .venv where that is missing or older than pyproject.toml.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder # a process for each core; tests/conftest.py orders the files

.PHONY: demo test test-all test-gpu planted check audit docs clean
.DEFAULT_GOAL := demo

demo: .venv/.run-time
	@$(BIN)/keifu demo

test: .venv/.development
	@$(BIN)/python -m pytest $(PARALLEL)

# With the libraries that are only compared with, and with the tests that compute for more than 5 seconds or repeat others.
test-all: .venv/.test-all
	@$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

test-gpu: .venv/.development
	@$(BIN)/python -m pytest -m gpu -rs

# Plants each bug of tests/planted in a copy, and says which ones no test sees: make planted BUGS="training KTO" for some.
planted: .venv/.development
	@$(BIN)/python tests/planted/run.py $(BUGS)

check: .venv/.development
	@$(BIN)/ruff check src tests pretrained packaging examples $(wildcard benchmarks)
	@$(BIN)/ruff format --check --quiet src tests pretrained packaging examples $(wildcard benchmarks)
	@$(BIN)/basedpyright
	@$(BIN)/bandit --quiet --recursive --configfile pyproject.toml src

# Known faults of the installed packages; needs the network, and fails where a package could not be looked up.
audit: .venv/.development
	@$(BIN)/pip-audit --strict --local --skip-editable

# The documentation in both languages, into site/: open site/index.html. A link that leads nowhere is an error.
docs: .venv/.development
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

.venv/.run-time: pyproject.toml pretrained/pyproject.toml | .venv/bin/pip
	@echo "Installing keifu into .venv: a minute or two, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[audio,serve,svg]' -e ./pretrained
	@touch $@

.venv/.development: pyproject.toml pretrained/pyproject.toml | .venv/bin/pip
	@echo "Installing keifu and its development tools into .venv: a few minutes, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[development]' -e ./pretrained
	@touch $@ .venv/.run-time

.venv/.test-all: pyproject.toml pretrained/pyproject.toml | .venv/bin/pip
	@echo "Installing all that keifu is compared with into .venv: llama.cpp is compiled, which takes minutes, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test-all]' -e ./pretrained
	@touch $@ .venv/.development .venv/.run-time

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "keifu needs Python 3.11 or newer with venv, and none was found: install one, or name it with make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "keifu needs Python 3.11 or newer with venv, and $(PYTHON) is not that: name another with make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -m venv .venv

clean:
	rm -rf .venv
