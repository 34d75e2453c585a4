# `make serve` and `make test` set up what they need; nothing has to be installed before but Python and make.

VENV := .venv
PYTHON ?= python3
PORT ?= 8000
ARGS ?=
export PYTHON
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help install serve test test-gpu test-gpu-engine lint format clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml deploy/cpu/install.sh deploy/cpu/vllm/pyproject.toml
	deploy/cpu/install.sh $(VENV)
	@touch $@

install: $(VENV)/.installed ## Set up .venv with vLLM for CPUs, this package and the development tools

serve: install ## Serve the demo model on a CPU: make serve [PORT=8123] [ARGS="..."]
	@model=$$(toptheta demo-model) && \
	set -- VLLM_PLUGINS=toptheta VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
	    vllm serve "$$model" --attention-backend toptheta \
	    --served-model-name smollm2-135m-instruct --max-num-seqs 8 --enforce-eager --port $(PORT) $(ARGS) && \
	echo "$$*" && exec env "$$@"

test: install ## Run the tests
	python -m pytest

test-gpu: ## Run the kernels' tests on an NVIDIA GPU, in the environment at hand
	$(PYTHON) -m pytest tests/kernels tests/backend/test_gpu.py tests/benchmarks

test-gpu-engine: ## Run engines on an NVIDIA GPU, two for tensor parallelism, in the environment at hand
	$(PYTHON) -m pytest tests/e2e/test_engine.py tests/e2e/test_gpu_engine.py tests/e2e/test_gpu_reference.py

lint: install ## Check format, style and types
	ruff format --check .
	ruff check .
	mypy

format: install ## Rewrite the sources in the project's format
	ruff format .
	ruff check --fix .

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
