# make serve   set up, then serve the demo model with a quarter of the KV cache on 127.0.0.1:8000
#              (make serve PORT=8001 ARGS="--kv-budget 0.5")
# make test    set up, then run the tests, two at a time (make test ARGS="-m 'not engine and not
#              server'"; make test WORKERS=0 ARGS="--pdb tests/blocks" in this process)
# make test-all  the same with whole matrices where make test runs samples that have every pair of
#              values, and with more random lives of the scheduler
# make lint    set up, then check style and types
# make sanitize  set up, then call the CPU kernels with hostile arguments under AddressSanitizer and
#              UBSan (make sanitize SEED=2 FUZZ_SECONDS=600)
# make soak    set up, then thousands of random requests through real engines (20 minutes; make soak
#              ARGS="--minutes 60 --seed 7")
# make bench   set up, then every benchmark in its quick form and one report (some 40 minutes on
#              two cores; a killed run goes on where it was)
# make bench-gpu  for whoever has a GPU: correctness, kernels and serving in under 20 minutes, into
#              gpu-results.json; docs/gpu.md says where to send it. Nothing is set up: name a Python
#              with vLLM 0.32 for GPUs (make bench-gpu PYTHON=/path/to/python ARGS="--minutes 10")
# make fleet   set up, then two replicas, nginx, HAProxy, Prometheus and Alertmanager as processes,
#              from the files of deploy/ (make fleet ARGS="--kv-budget=0.5"); make fleet-check runs
#              the tests of such a fleet, a quarter of an hour
# make chaos   set up, then five minutes of a fleet in which things go wrong, under load (make chaos
#              ARGS="--minutes 60 --seed 7"); a table, and build/chaos.json
# make figures draw the pictures and fill the tables from benchmarks/results/*.json
# make clean   remove what the others made, except .venv and the model

PORT ?= 8000
ARGS ?=
# An engine takes a core and some 2 GB of memory.
WORKERS ?= 2
BIN := .venv/bin

export VLLM_KVCRUSH_CACHE ?= $(CURDIR)/.cache
# The set-up leaves compiling to the first import; where nothing may be written, each of vLLM's
# processes would compile everything anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup model serve test test-all lint sanitize soak bench bench-gpu figures fleet fleet-check chaos clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^# make/,/^$$/s/^# \{0,1\}//p' Makefile

setup:
	@scripts/setup.sh

model: setup
	@$(BIN)/python -m vllm_kvcrush.tools.demo_model >/dev/null

serve: model
	@MODEL="$$($(BIN)/python -m vllm_kvcrush.tools.demo_model)" PORT=$(PORT) scripts/serve.sh $(ARGS)

test: model
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: export KVCRUSH_FULL = 1
test-all: test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@files="$$(find csrc tests/native vllm_kvcrush -type f \( -name '*.c' -o -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)"; \
	if [ -n "$$files" ]; then \
		echo "$(BIN)/clang-format --dry-run -Werror (over C++ and CUDA)"; \
		$(BIN)/clang-format --dry-run -Werror $$files; \
	else \
		echo "clang-format: no C++ or CUDA files, nothing to check."; \
	fi

sanitize: setup
	@scripts/sanitize.sh $(ARGS)

soak: setup
	$(BIN)/python -m tests.soak $(ARGS)

bench: model
	$(BIN)/python -m benchmarks $(ARGS)

bench-gpu:
	@$(or $(PYTHON),python3) -m benchmarks.gpu_device $(ARGS)

figures: setup
	$(BIN)/python -m benchmarks.figures

clean:
	rm -rf build dist ./*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache benchmarks/results/tmp benchmarks/results/quick
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

fleet: model
	@$(BIN)/python -m deploy.fleet $(ARGS)

fleet-check: export KVCRUSH_FLEET = 1
fleet-check: model
	$(BIN)/python -m pytest tests/fleet $(ARGS)

chaos: model
	$(BIN)/python -m tests.chaos $(ARGS)
