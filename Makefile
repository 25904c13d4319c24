# make demo    fuse a real model and show what it gains
# make test    the tests; `make test-all` adds the slow ones
# make bench   measure the model set against onnxruntime
# make bench-ablation   measure what each layer of the fusion gains
# make bench-stitching   measure reductions against kernels written by hand
# make bench-gpu   compile the model set for GPUs and predict what they would do; none is needed
# make gpu   run the tests for GPUs and every kernel of the model set on the GPU at hand, check and time them
# make bench-peers   measure the builders against OpenVINO and IREE, which it installs
# make bench-cost   measure how far the cost model is from what kernels take
# make notebook   run notebooks/fused_vs_unfused.ipynb and store it with what it measured
# make scale   measure how the compiler's time and memory grow with the model
# make lint    format, lint and type checks
# make clean   remove what builds, tests and tools leave; .venv stays
#
# Each makes what it needs in .venv first. PYTHON names another interpreter than python3.

PYTHON ?= python3
DEMO_MODEL ?= ppocr_rec
DEMO_ARGS ?= --shape x:1,3,48,320
PYTEST_ARGS ?=
BENCH_ARGS ?=
SCALE_ARGS ?=
COST_ARGS ?=
GPU_ARGS ?=
PEERS_ARGS ?=
NOTEBOOK_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DELETE_ON_ERROR:
.PHONY: demo test test-all bench bench-ablation bench-cost bench-gpu bench-peers bench-stitching \
	gpu notebook scale lint clean

demo: $(INSTALLED)
	@mkdir -p build/demo
	@model=$$($(BIN)/python -c 'import models; print(models.path("$(DEMO_MODEL)"))') && \
	$(BIN)/apollo-fuse "$$model" $(DEMO_ARGS) -o build/demo/$(DEMO_MODEL).fused.onnx \
	--json build/demo/$(DEMO_MODEL).json

test: $(INSTALLED)
	$(BIN)/pytest -n auto -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(BIN)/pytest -n auto $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench $(BENCH_ARGS)

bench-ablation: $(INSTALLED)
	@mkdir -p build
	$(BIN)/python -m benchmarks.ablation --json build/ablation.json --markdown build/ablation.md \
	--plot build/ablation.png $(BENCH_ARGS)

bench-stitching: $(INSTALLED)
	$(BIN)/python -m benchmarks.stitching $(BENCH_ARGS)

bench-peers: $(INSTALLED)
	@mkdir -p build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[peers]"
	$(BIN)/python -m benchmarks.peers --json build/peers.json --markdown build/peers.md $(PEERS_ARGS)

bench-cost: $(INSTALLED)
	$(BIN)/python -m benchmarks.cost $(COST_ARGS)

bench-gpu: $(INSTALLED)
	@mkdir -p build
	$(BIN)/python -m benchmarks.gpu --json build/gpu.json --markdown build/gpu.md $(GPU_ARGS)

# 77 says that there is no GPU, which is no failure.
gpu: $(INSTALLED)
	@mkdir -p build
	$(BIN)/pytest -m gpu tests/gpu
	$(BIN)/python -m benchmarks.on_device --json build/on_device.json --markdown build/on_device.md $(GPU_ARGS) \
	|| [ $$? -eq 77 ]

notebook: $(INSTALLED)
	$(BIN)/python -m notebooks.run $(NOTEBOOK_ARGS)

scale: $(INSTALLED)
	$(BIN)/python -m benchmarks.scale $(SCALE_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist apollo_fuse.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The ziglang package brings a C compiler to machines that have none.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "make: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	{ echo "make: $(PYTHON) cannot make a virtual environment; install its venv module" >&2; exit 1; }
	@extras=dev,notebook; \
	if ! { [ -n "$${CC:-}" ] || command -v gcc || command -v clang || command -v cc; } >/dev/null; \
	then extras=$$extras,cc; fi; \
	echo "installing apollo-fuse [$$extras] into $(VENV)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$$extras]"
	@touch $@
