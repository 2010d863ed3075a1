# Needs Python 3.11 or newer and make; everything else is fetched into .venv.
#
#   make env     the maskwright command in .venv, ready to use
#   make demo    train, measure and draw a small Mask R-CNN on generated scenes, offline, on the CPU
#   make test    the whole test suite          make fast   its quick part, under a minute
#   make lint    format, lint, types, imports  make wheel  build the wheel and try it in an empty environment
#   make docs    the documentation site, into build/docs; warnings are errors
#   make tables  the tables of systems in README.md and docs, from the registry
#   make page    the page of maskwright annotate from page/ (node 20 or newer)
#   make figures NAME=scenes    run the commands of a published figure again (docs/figures.toml lists them)
#   make coverage    the test suite with coverage measured, into build/coverage
#   make ci      lint, test, wheel and docs: what .ci/run calls

.PHONY: help env dev demo test fast coverage lint format wheel docs tables figures page ci constraints clean
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= auto

help:
	@sed -n 's/^#   //p' Makefile

# Without Debian's python3-venv there is no ensurepip; the interpreter's own pip is used then.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found. Name one: make env PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet 'pip>=25.1'; }
	@touch $@

$(VENV)/.ready: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing maskwright into $(VENV) (torch is large: a few minutes on a slow line)"
	@$(PIP) install --quiet --upgrade -c constraints.txt pip
	@$(PIP) install --progress-bar on -c constraints.txt -e '.[train,eval]' | grep --line-buffered -E '^(Downloading|Installing|Successfully)' | cut -c1-100
	@$(BIN)/maskwright --version
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "Installing the requirements of the tests"
	@$(PIP) install --quiet -c constraints.txt -e '.[all]' -e ./weights --group dev
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@echo "Installing the requirements of the documentation"
	@$(PIP) install --quiet -c constraints.txt --group docs
	@touch $@

env: $(VENV)/.ready
	@echo "Ready: $(BIN)/maskwright --help"

dev: $(VENV)/.ready-dev

demo: $(VENV)/.ready
	@$(BIN)/maskwright demo -o demo

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n $(JOBS)

fast: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n $(JOBS) -m fast

coverage: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term --cov-report=html

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python docs/figures.py check

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Installs the wheel with the base dependencies of .venv and runs it, to check that it does not depend on the clone.
wheel: $(VENV)/.ready-dev
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m zipfile -l build/wheel/maskwright-*.whl | grep -q maskwright/py.typed
	$(PYTHON) -m zipfile -l build/wheel/maskwright-*.whl | grep -q maskwright/weights/manifest.json
	$(PYTHON) -m zipfile -l build/wheel/maskwright-*.whl | grep -q maskwright/web/page/app.js
	$(PIP) install --quiet --no-deps --target build/wheel/installed build/wheel/maskwright-*.whl
	cd build/wheel && PYTHONPATH=installed ../../$(BIN)/python -c "import maskwright, pathlib; assert 'installed' in pathlib.Path(maskwright.__file__).parts"
	cd build/wheel && PYTHONPATH=installed ../../$(BIN)/python -m maskwright systems

docs: $(VENV)/.ready-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "Built build/docs/index.html"

# The tables of systems in the documents, from the registry.
tables: $(VENV)/.ready
	$(BIN)/python docs/tables.py

page/node_modules: page/package.json page/package-lock.json
	cd page && npm ci --ignore-scripts
	@touch $@

# The built page is committed; tests/page/test_built.py checks that it belongs to its sources.
page: page/node_modules
	cd page && npm run --silent build

# The commands of a figure in the documents; without NAME, the figures that there are. DATA is the folder of the data sets.
figures: $(VENV)/.ready-dev
	@if test -n "$(NAME)"; then $(BIN)/python docs/figures.py run "$(NAME)"; else $(BIN)/python docs/figures.py list; fi

ci: lint test wheel docs

# All installed packages, except maskwright and the platform-specific parts of torch.
constraints: $(VENV)/.ready-dev $(VENV)/.ready-docs
	@$(PIP) install --quiet -c constraints.txt -e '.[all,ray,codecs]'
	@{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --all | grep -viE '^(nvidia|cuda|triton|maskwright|setuptools|-e|# )|@' | LC_ALL=C sort -f; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist demo
