# `make` alone says what there is to make.
PYTHON ?= python3
PY := .venv/bin/python
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
DEV_READY := .venv/.dev-$(KEY)
DEMO_READY := $(firstword $(wildcard $(DEV_READY)) .venv/.demo-$(KEY))
DEMO_TEXT = $(shell $(PY) -c "import argparse; print(argparse.__file__)")
DEMO_OUT ?= out/demo
DEMO_MECHANISMS = -m streaming_llm -m 'streaming_llm(window=256)' -m 'window(511) & causal | sinks(4)' -m mswa \
    -m power_attention -m minference_block_sparse -m moba -m delta_attention

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs clean

help:
	@echo 'make demo      compare attention mechanisms on the built-in model at 8192 tokens, with a report'
	@echo 'make test      run the tests'
	@echo 'make test-all  run the tests and the longer sweeps'
	@echo 'make lint      check style and types'
	@echo 'make docs      write docs/catalogue.md again from the registry'
	@echo 'make clean     remove the virtual environment and what the demo wrote'

demo: $(DEMO_READY)
	.venv/bin/foveate compare --model builtin --text $(DEMO_TEXT) --length 8192 --windows 2 --repeats 3 --max-loss 0.03 \
	    --out $(DEMO_OUT) $(DEMO_MECHANISMS)

test: $(DEV_READY)
	$(PY) -m pytest

test-all: $(DEV_READY)
	$(PY) -m pytest -m ''

lint: $(DEV_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(DEV_READY)
	$(PY) -m foveate.lab.catalogue_page docs/catalogue.md

clean:
	rm -rf .venv out/demo

# The stamps carry a checksum of pyproject.toml and constraints.txt: pip runs only when one of them changed.
.venv/.demo-$(KEY):
	$(call install,hf$(,)report,$@)

$(DEV_READY):
	$(call install,dev,$@)

, := ,
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Foveate needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
@echo 'Installing into .venv; this takes a minute or two the first time.'
@test -x $(PY) || $(PYTHON) -m venv .venv
@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
@rm -f .venv/.demo-* .venv/.dev-*
@touch $(2)
endef
