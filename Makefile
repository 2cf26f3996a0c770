# Everything a newcomer or CI needs, with only Python and make. The first target builds .venv; later ones reuse it.
#   make quickstart   the whole loop on a drawn world, into runs/quickstart
#   make test         style, types and the quick tests (minutes)
#   make test-slow    the long tests
#   make docs         the documentation as a site, into site/
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: quickstart test test-slow docs style types venv clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,6s/^# \{0,1\}//p' Makefile

venv: .venv/.dev

# The stamps are newer than what they were made from, or the environment is brought up to date.
.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on PATH. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 5; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: leveret needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 5; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "make: $(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv"; exit 5; }
	$(PYTHON) -m venv .venv
	@echo "installing leveret into .venv: a minute or two"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	@touch $@

.venv/.dev: .venv/.installed
	@echo "installing what tests, types and the documentation need"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: .venv/.installed
	$(BIN)/leveret quickstart

style: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy --num-workers $(JOBS)

# Compiled files are kept, whatever the shell says: the tests start some sixty processes.
test: style types
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

# One process: each of these already uses every core.
test-slow: venv
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The variable silences a word about MkDocs 2, which the range in pyproject.toml keeps out.
docs: venv
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the documentation is site/index.html"

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build site
