# make quickstart   install, run the study `quick`, print the comparison
# make test         install what the tests need, run them all
# make help         the rest

VENV ?= .venv
# The first Python that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart install test test-slow lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/installed  ## install, run a real ablation (minutes), print the comparison
	$(BIN)/deltalab run quick

install: $(VENV)/installed  ## install only

# `pytest`, not `python -m pytest`: that one puts the checkout on sys.path, where transformers takes kernels/ for a package.
test: $(VENV)/installed-test  ## install what the tests need and run them all
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(VENV)/installed-test  ## the tests that take minutes each
	$(BIN)/pytest -m slow

lint: $(VENV)/installed-dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The package's name is not its folder's, so mypy is shown the checkout under the right one.
	@rm -rf $(VENV)/typecheck && mkdir -p $(VENV)/typecheck && ln -s "$(CURDIR)" $(VENV)/typecheck/deltalab
	MYPYPATH=$(VENV)/typecheck $(BIN)/mypy -p deltalab

clean:  ## remove the environment (results stay)
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "deltalab needs Python 3.11 or newer; none was found. Install one, or say PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: it is renewed when the dependencies or their pins change, so that a second call installs nothing.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@
$(VENV)/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@ $(VENV)/installed
$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/installed $(VENV)/installed-test
