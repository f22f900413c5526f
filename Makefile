# The commands of this repository. `make demo` and `make test` need only Python >= 3.11, pip and make.
LANE ?= base
VENV ?= $(if $(filter base,$(LANE)),.venv,.venv-$(LANE))
REQUIREMENTS ?= requirements/$(LANE).txt
DEMO_REQUIREMENTS ?= requirements/$(LANE)-demo.txt
ARGS ?=

# The first interpreter that is new enough and can make a virtual environment; `make PYTHON=...` chooses another.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	"$$p" -c "$(USABLE)" >/dev/null 2>&1 && echo "$$p" && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test compile lint types format bench pins clean

help:
	@echo "make demo    train a small language model on real text (ARGS=... is passed on: make demo ARGS='--steps 50')"
	@echo "make test    run every test (ARGS='-k scan' selects)"
	@echo "make compile every kernel for H100, H200 and A100, without a GPU (ARGS=--full: at every dtype, width and GPU)"
	@echo "make lint | types | format | bench | pins | clean"

# Where there is no NVIDIA driver, JAX need not try the CUDA plugin that the tests compile with.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
demo bench: export JAX_PLATFORMS ?= cpu
endif

demo: $(VENV)/.ready-demo
	$(BIN)/python -m evo_jax demo $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 8 $(ARGS)

# The newest lane takes one GPU alone: its budgets and lowering are JAX's, and the base lane has all three.
compile: $(VENV)/.ready
	$(BIN)/python -m benchmarks.compile_report --require-compile $(if $(filter newest,$(LANE)),--target h100) $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.ready
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.run $(ARGS)

# Run by the lane's own Python, straight from its package index: make pins LANE=newest PYTHON=python3.12
pins:
	$(PYTHON) requirements/pin.py $(LANE)

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@"$(PYTHON)" -c "$(USABLE)" 2>/dev/null || { \
	  echo "evo-jax needs Python >= 3.11 with its venv and ensurepip modules, and found $(if $(PYTHON),only '$(PYTHON)',none)."; \
	  echo "Install one (on Debian and Ubuntu also the package python3-venv) or name it: make PYTHON=/path/to/python3.11 ..."; \
	  exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# --no-deps: the pins are complete; --no-build-isolation: hatchling is among them.
define install
	$(PIP) --requirement $<
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
endef

$(VENV)/.ready: $(REQUIREMENTS) pyproject.toml | $(BIN)/python
	@echo "Installing $(REQUIREMENTS) into $(VENV) (once; a few minutes)"
	$(install)
	@touch $(VENV)/.ready-demo

$(VENV)/.ready-demo: $(DEMO_REQUIREMENTS) pyproject.toml | $(BIN)/python
	@echo "Installing $(DEMO_REQUIREMENTS) into $(VENV) (once; about a minute)"
	$(install)
