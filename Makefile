# The Attention Memory Lab.  `make` lists what there is to do.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

# The Python that makes .venv: the first of these that is at least 3.11.  Or: make PYTHON=… book
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; exit; fi; done)

PY := .venv/bin/python
# .venv is ready when this file exists: another lock, another pyproject.toml or another place on
# disk is another name.
READY := .venv/.ready-$(shell cat requirements.txt pyproject.toml <(echo "$(CURDIR)") | cksum | cut -d" " -f1)

NB ?= notebooks
PORT ?= 8000
ARGS ?=
# one more than two cores: a worker that drives a browser, a kernel or a build mostly waits
WORKERS ?= 3

.PHONY: help venv book test execute lab serve record lint lock address clean distclean

help: ## list the targets
	@echo "The Attention Memory Lab"
	echo
	sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

venv: $(READY)

$(READY): | requirements.txt pyproject.toml
	@if [ -z "$(PYTHON)" ]; then
	  echo "make: found no Python 3.11 or newer (python3 is $$(python3 --version 2>&1 || true))." >&2
	  echo "      Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2
	  exit 1
	fi
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	  echo "make: $$($(PYTHON) --version) lacks venv. On Debian or Ubuntu: apt-get install python3-venv" >&2
	  exit 1
	fi
	# a .venv whose Python is gone or too old is no use: make it anew
	if ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
	  rm -rf .venv
	  echo "Making .venv with $$($(PYTHON) --version)"
	  $(PYTHON) -m venv .venv
	fi
	echo "Installing requirements.txt into .venv (minutes the first time)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	rm -f .venv/.ready-*
	touch $@

book: $(READY) ## build the site into _build/html, warnings as errors
	@$(PY) tools/build.py

test: $(READY) ## run every test, and every notebook against its stored outputs
	@$(PY) tools/browser.py --install
	@# in the order of tests/conftest.py, where the longest files come first
	@# one thread each: several workers whose threads wait for each other by spinning are slower
	OMP_NUM_THREADS=1 $(PY) -m pytest -p tools.fast_start -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  --nbval tests notebooks $(ARGS)

execute: $(READY) ## run the notebooks in place on this machine (NB=notebooks/01_….ipynb for one)
	@$(PY) tools/execute.py $(NB)

lab: $(READY) ## open the notebooks in JupyterLab
	@# JupyterLab would ask its makers for news and updates; the versions are locked here
	$(PY) -m jupyterlab notebooks --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  --LabApp.extension_manager=readonly $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(ARGS)

serve: book ## build the site and serve it on http://localhost:8000 (PORT=…)
	@echo "http://localhost:$(PORT)/  (Ctrl-C to stop)"
	$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

record: $(READY) ## measure this machine and write records/<gpu>/ (ARGS="hierarchy roofline" for some)
	@$(PY) -m labkit record $(ARGS)

lint: $(READY) ## ruff over code and notebooks
	@$(PY) -m ruff check .

lock: $(READY) ## write requirements.txt from what is installed in .venv
	@$(PY) tools/lock.py

address: $(READY) ## set the repository's address everywhere: make address URL=https://github.com/…
	@$(PY) tools/address.py $(if $(filter command,$(origin URL)),--set "$(URL)",)

clean: ## remove what was built
	@rm -rf _build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## … and .venv
	@rm -rf .venv
