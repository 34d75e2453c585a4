# `make serve` and `make test` set up what they need; nothing has to be installed before but Python and make.

VENV := .venv
PYTHON ?= python3
PORT ?= 8000
ARGS ?=
export PYTHON
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help install serve test test-nightly test-image test-soak test-gpu test-gpu-engine lint lint-deploy audit package
.PHONY: format clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml deploy/cpu/install.sh deploy/cpu/vllm/pyproject.toml
	deploy/cpu/install.sh $(VENV)
	@touch $@

install: $(VENV)/.installed ## Set up .venv with vLLM for CPUs, this package and the development tools

serve: install ## Serve the demo model on a CPU: make serve [PORT=8123] [ARGS="..."]
	@model=$$(toptheta demo-model) && \
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
	    exec toptheta serve "$$model" --served-model-name smollm2-135m-instruct \
	    --max-num-seqs 8 --enforce-eager --port $(PORT) $(ARGS)

# two tests at a time: more threads than cores slow each other down
two_at_a_time = OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind python -m pytest -n 2
# tests that share an engine or a server run in one process
by_group = --dist loadgroup
interpreted = tests/kernels/test_schedule.py tests/kernels/test_decode.py tests/kernels/test_value_sums.py \
    tests/kernels/test_shadow.py tests/kernels/test_tiers.py tests/kernels/test_new_tokens.py tests/backend/test_gpu.py \
    tests/backend/test_gpu_shadow.py tests/backend/test_gpu_tiers.py \
    tests/benchmarks/test_quality.py tests/benchmarks/test_replay.py

test: install ## Run the tests: without engines, the kernels in Triton's interpreter, then engines and servers
	$(two_at_a_time) --dist worksteal -m "not e2e and not image and not soak and not nightly"
	TRITON_INTERPRET=1 $(two_at_a_time) --dist worksteal -p tests.interpreter $(interpreted)
	$(two_at_a_time) $(by_group) -m "e2e and not soak and not nightly"

test-nightly: install ## Run what takes longer: engines of the demo model, more examples, Chromium
	$(two_at_a_time) $(by_group) -m nightly

test-image: install ## Run the CPU image's steps without a container; needs root, and installs vLLM anew
	python -m pytest -m image tests/deploy

test-soak: install ## Load, stop and kill servers, and set off the guard of one
	python -m pytest -m soak

test-gpu: ## Run the kernels' tests on an NVIDIA GPU, in the environment at hand
	$(PYTHON) -m pytest tests/kernels tests/backend/test_gpu.py tests/backend/test_gpu_shadow.py tests/backend/test_gpu_tiers.py \
	    tests/backend/test_guard_monitor.py tests/benchmarks

test-gpu-engine: ## Run engines on an NVIDIA GPU, several at a time with ARGS="-n 4 --dist loadgroup", two GPUs for all
	$(PYTHON) -m pytest $(ARGS) tests/e2e/test_engine.py tests/e2e/test_invariance.py tests/e2e/test_shadow.py \
	    tests/e2e/test_gpu_engine.py tests/e2e/test_gpu_reference.py tests/e2e/test_sinks.py tests/e2e/test_hybrids.py \
	    tests/e2e/test_sharing.py tests/e2e/test_drafts.py tests/e2e/test_connectors.py

lint: install lint-deploy ## Check format, style and types, and deploy/
	ruff format --check .
	ruff check .
	mypy

lint-deploy: install ## Check deploy/: shell, Dockerfiles, YAML, the schemas of compose files and Kubernetes
	shellcheck .ci/run .ci/nightly deploy/cpu/install.sh
	hadolint deploy/docker/Dockerfile.*
	yamllint --strict -c deploy/.yamllint.yaml deploy
	check-jsonschema --builtin-schema vendor.compose-spec deploy/compose/compose.yaml
	kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml

audit: install ## Look for known vulnerabilities; AUDIT=--allow-offline where the database is out of reach
	python .ci/audit.py $(AUDIT)

package: install ## Build the sdist and the wheel into dist/
	python -m hatchling build -d dist

format: install ## Rewrite the sources in the project's format
	ruff format .
	ruff check --fix .

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
