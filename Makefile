# The same recipes for people and for CI. `make` alone lists them.
#
# Needs git, make and Python 3.11 or newer with its venv module; everything else goes into .venv in this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Other people's clients of the API, in an environment of their own: they need another version of the openai package.
CLIENTS := $(VENV)/.clients
CLIENT_TESTS := tests/gateway/clients
# The pin stands in pyproject.toml only. torch goes in first and by itself: asked for together with the other packages,
# a resolver may try newer builds before it comes back to the pinned one, gigabytes each.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Which inputs `make fuzz` makes.
SEEDS ?= 0:1000000

.DEFAULT_GOAL := help
.PHONY: help up test long check bench fuzz lint types format clean

help: ## list these recipes
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1 \2/p' $(MAKEFILE_LIST) | while read -r name what; do \
	  printf '  make %-8s %s\n' "$$name" "$$what"; done

up: $(INSTALLED) ## install on first use, then run a private swarm on this machine until Ctrl-C
	@exec $(BIN)/shoal up

test: lint types $(CLIENTS) ## everything that CI runs: lint, format, types, tests
	@$(BIN)/python -m pytest -m "not long"

long: $(CLIENTS) ## the ten tests of up to a minute and more that `make test` leaves out
	@$(BIN)/python -m pytest -m long

check: lint types ## the fast part of `make test`, for before each commit
	@$(BIN)/python -m pytest -m "not slow and not long and not gpu"

bench: $(INSTALLED) ## the figures of `shoal bench swarm`
	@$(BIN)/shoal bench swarm

fuzz: $(INSTALLED) ## a million hostile inputs; `make fuzz SEEDS=400000:1000000` takes a part of them
	@$(BIN)/shoal bench fuzz --seeds $(SEEDS) --corpus tests/fuzz

lint: $(INSTALLED) ## lint and format check
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --check --quiet . || { echo "Some files are not formatted: run 'make format'." >&2; exit 1; }

types: $(INSTALLED) ## type check; strict in the pure folders
	@$(BIN)/mypy --no-error-summary

format: $(INSTALLED) ## write the formatting that `make lint` asks for
	@$(BIN)/ruff check --quiet --fix . && $(BIN)/ruff format --quiet .

clean: ## remove .venv and every cache
	rm -rf $(VENV) $(CLIENT_TESTS)/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Done once, and again only when pyproject.toml changes. The stamp is written last, so an interrupted install is resumed.
$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no '$(PYTHON)' on this machine." >&2; \
	  echo "hint: install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv)." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); shoal needs Python 3.11 or newer." >&2; \
	  echo "hint: name a newer one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; Debian and Ubuntu pack it by itself." >&2; \
	  echo "hint: apt install python3-venv, then run make again." >&2; exit 1; }
	@echo "Installing into $(VENV) (first time only; torch is the big one) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(TORCH)
	@echo "Installing shoal and its other packages ..."
	@$(PIP) install --quiet --editable '.[dev]'
	@touch $@

$(CLIENTS): $(INSTALLED) $(CLIENT_TESTS)/requirements.txt $(CLIENT_TESTS)/package-lock.json
	@echo "Installing other people's clients into $(VENV)/clients, for their tests ..."
	@$(PYTHON) -m venv $(VENV)/clients
	@$(VENV)/clients/bin/python -m pip --disable-pip-version-check --no-input install --quiet \
	  --requirement $(CLIENT_TESTS)/requirements.txt
	@if command -v npm >/dev/null; then npm ci --prefix $(CLIENT_TESTS) --silent; \
	  else echo "No npm on this machine: the tests with Vercel's ai-sdk will be skipped."; fi
	@touch $@
