"""llama.cpp in its own process: JSON requests on stdin, JSON answers on stdout, so that rounds can alternate.

Runs in the environment of `make bench-peers`, imports nothing of qat. BINDING is llama_cpp (native source build, step
by step through the C API) or xllamacpp (wheel; its server's own timings).

    python scripts/peer_llama.py BINDING
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any


class Native:
    """A model held by llama-cpp-python's C API."""

    def __init__(self, file: str, positions: int):
        import llama_cpp

        self.c = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = positions, positions, 512
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forward(self, ids: list[int]) -> float:
        """Seconds of running these tokens after those that are cached."""
        array = (self.c.llama_token * len(ids))(*ids)
        started = time.perf_counter()
        code = self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(ids)))
        self.c.llama_synchronize(self.context)
        seconds = time.perf_counter() - started
        if code:
            raise RuntimeError(f"llama_decode answered {code}")
        return seconds

    def clear(self) -> None:
        """Forget all tokens."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def logits(self, ids: list[int]) -> list[list[float]]:
        """Logits of every position."""
        self.clear()
        rows = []
        for token in ids:
            self.forward([token])
            rows.append(list(self.c.llama_get_logits_ith(self.context, -1)[: self.vocabulary]))
        return rows

    def measure(self, prompt: list[int], steps: list[int], threads: int) -> list[float]:
        """Seconds of the prompt, and of one further token (median)."""
        self.c.llama_set_n_threads(self.context, threads, threads)
        self.clear()
        prefill = self.forward(prompt)
        return [prefill, statistics.median([self.forward([token]) for token in steps] or [0.0])]


class Wheel:
    """A model held by the xllamacpp wheel; one server for each number of threads."""

    def __init__(self, file: str, positions: int):
        self.file, self.positions = file, positions
        self.servers: dict[int, Any] = {}

    def measure(self, prompt: list[int], steps: list[int], threads: int) -> list[float]:
        """Seconds of the prompt and of one further token, as its server reports them."""
        import xllamacpp

        if threads not in self.servers:
            self.servers.clear()
            options = xllamacpp.CommonParams()
            options.model.path, options.n_ctx, options.n_parallel = self.file, self.positions, 1
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
            options.warmup = False
            self.servers[threads] = xllamacpp.Server(options)
        request = {"prompt": prompt, "n_predict": max(1, len(steps)), "cache_prompt": False}
        answer = self.servers[threads].handle_completions(request | {"temperature": 0.0, "ignore_eos": True})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        timings = answer["timings"]
        return [timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"] / 1e3]


def quantize(source: str, target: str, kind: str) -> None:
    """llama.cpp's own quantization of a GGUF file; kind Q4_0, Q8_0 or F16."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize, options.nthread = True, 2
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), options)
    if code:
        raise RuntimeError(f"llama_model_quantize answered {code}")


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints must not mix with the answers
    held: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        verb, name = request.pop("verb"), request.pop("name", "")
        try:
            if verb == "open":
                held[name] = {"llama_cpp": Native, "xllamacpp": Wheel}[sys.argv[1]](**request)
                answer: Any = True
            elif verb == "quantize":
                quantize(**request)
                answer = True
            else:
                answer = getattr(held[name], verb)(**request)
            reply = {"answer": answer}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
