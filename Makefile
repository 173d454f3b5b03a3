# `make` alone says what there is to make.
PYTHON ?= python3
PY := .venv/bin/python
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
DEV_READY := .venv/.dev-$(KEY)
DEMO_READY := $(firstword $(wildcard $(DEV_READY)) .venv/.demo-$(KEY))
DEMO_TEXT = $(shell $(PY) -c "import argparse; print(argparse.__file__)")
DEMO_OUT ?= out/demo
MINUTES ?= 10
WORKERS ?= 2
DEMO_MECHANISMS = -m streaming_llm -m 'streaming_llm(window=256)' -m 'window(511) & causal | sinks(4)' -m mswa \
    -m power_attention -m minference_block_sparse -m moba -m delta_attention

PYTEST = $(PY) -m pytest -n $(WORKERS) --dist worksteal

# The tests that run the kernels, rather than build or find them, and those kernels that compute with vectors.
KERNEL_TESTS := $(filter-out $(addprefix tests/kernels/test_,$(addsuffix .py,build buffers neon refusals sanitized selection short trust)),\
    $(wildcard tests/kernels/test_*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz lint docs clean

help:
	@echo 'make demo      compare attention mechanisms on the built-in model at 8192 tokens, with a report'
	@echo 'make test      run the tests on WORKERS=2 processes, those of the native kernels with AVX2 too'
	@echo 'make test-all  run the tests and the longer sweeps: native kernels under sanitizers, NEON in an emulator'
	@echo 'make fuzz      random calls of everything for MINUTES=10, on WORKERS=2 processes; SANITIZE=1: kernels with checks'
	@echo 'make lint      check style and types'
	@echo 'make docs      write the index of the catalogue, the evidence of its tests and the pages of docs/ again'
	@echo 'make clean     remove the virtual environment and what the demo wrote'

demo: $(DEMO_READY)
	.venv/bin/foveate compare --model builtin --text $(DEMO_TEXT) --length 8192 --windows 2 --repeats 3 --max-loss 0.03 \
	    --force --out $(DEMO_OUT) $(DEMO_MECHANISMS)

test: $(DEV_READY)
	$(PYTEST)
	$(call with_avx2,)

test-all: export FOVEATE_SEED ?= fresh
test-all: $(DEV_READY)
	$(PYTEST) -m ''
	$(call with_avx2,-m '')

fuzz: $(DEV_READY)
	$(PY) -m fuzz --minutes $(MINUTES) --workers $(WORKERS) $(if $(SANITIZE),--sanitize) $(FUZZ)

lint: $(DEV_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(DEV_READY)
	$(PY) -m foveate.catalogue.index
	$(PY) -m foveate.catalogue.evidence tests
	$(PY) -m foveate.lab.pages.catalogue docs/catalogue.md
	$(PY) -m foveate.lab.pages.patterns docs

clean:
	rm -rf .venv out/demo

# The stamps carry a checksum of pyproject.toml and constraints.txt: pip runs only when one of them changed.
.venv/.demo-$(KEY):
	$(call install,hf$(,)report,$@)

$(DEV_READY):
	$(call install,dev,$@)

# Where the processor has better than AVX2, the first run did not touch these kernels.
define with_avx2
@if $(PY) -c 'import sys; from foveate.kernels.cpu.processor import lacks; from foveate.kernels.cpu.variants import BY_NAME; sys.exit(lacks(BY_NAME["avx2"]))'; \
then echo 'The tests of the native kernels once more, with AVX2:' && FOVEATE_ISA=avx2 $(PYTEST) $(1) $(KERNEL_TESTS); \
else echo 'The AVX2 kernels are not tested: this processor does not run them.'; fi
endef

, := ,
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Foveate needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
@echo 'Installing into .venv; this takes a minute or two the first time.'
@test -x $(PY) || $(PYTHON) -m venv .venv
@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
@rm -f .venv/.demo-* .venv/.dev-*
@touch $(2)
endef
