# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test slow check format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## explain real photographs with a real ImageNet network; names what it wrote
	$(BIN)/python -m diffcam_fast.demo -o demo-out

test: $(VENV)/.test  ## install what the tests need, and run them
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

slow: $(VENV)/.test  ## the tests that take minutes to hours
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: $(VENV)/.dev  ## lint, format and types, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and everything that was built or written
	rm -rf $(VENV) build demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache

# One marker file for each extra: make installs it once, and again when its list changes.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: setup.py pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); with PyTorch, the first time, some minutes and 6 GB"
	$(PIP) --editable '.[$*]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
