"""Tokens per second of decoding and prefill: our engine against transformers, in one run, alternating.

    python scripts/bench_decode.py EXPORT_FOLDER [--tokens 64] [--rounds 5] [--output docs/results/bench_decode.json]

Threads 1 and 2. No number is printed when the engine's logits are not those of transformers on the same weights. Bytes
per token and the share of the read bandwidth measured in the same run are given with each figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

KL_LIMIT = 0.01  # nats; bf16 and int8 arithmetic of one model differ by less, a wrong kernel by far more
PROMPT = 256


def read_bandwidth() -> float:
    """GB/s of summing 512 MB, with the threads in use."""
    block = torch.ones(1 << 27)
    block.sum()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return block.numel() * 4 / min(times) / 1e9


def rows(count: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot and position of `count` tokens of one sequence."""
    return torch.zeros(count, dtype=torch.long), torch.arange(start, start + count)


def check(engine: Any, reference: Any, ids: torch.Tensor) -> float:
    """Mean KL of the engine's predictions from those of transformers; ends the program when they disagree."""
    count = ids.numel()
    found = engine.forward(ids, *rows(count, 0), torch.arange(count)).log_softmax(-1)
    with torch.no_grad():
        wanted = reference(ids[None]).logits[0].float().log_softmax(-1)
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    if not kl < KL_LIMIT:
        raise SystemExit(f"engine and transformers disagree (KL {kl:.4f}), no numbers")
    return kl


def engine_seconds(engine: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of one prefill of the prompt, and of one decoded token (median)."""
    started = time.perf_counter()
    engine.forward(ids, *rows(ids.numel(), 0), torch.tensor([ids.numel() - 1]))
    prefill = time.perf_counter() - started
    steps = []
    for i in range(tokens):
        started = time.perf_counter()
        engine.forward(ids[i : i + 1], *rows(1, ids.numel() + i), torch.tensor([0]))
        steps.append(time.perf_counter() - started)
    return prefill, statistics.median(steps)


@torch.no_grad()
def transformers_seconds(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """The same with transformers' own cache, bf16 weights and activations."""
    started = time.perf_counter()
    cache = model(ids[None], use_cache=True, logits_to_keep=1).past_key_values
    prefill = time.perf_counter() - started
    steps = []
    for i in range(tokens):
        started = time.perf_counter()
        cache = model(ids[None, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
        steps.append(time.perf_counter() - started)
    return prefill, statistics.median(steps)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both contenders in turn, for one and two threads."""
    from transformers import AutoModelForCausalLM

    from qat.serve.engine import Engine
    from qat.serve.load import read_export

    packed = read_export(args.folder)
    engine = Engine(packed, PROMPT + args.tokens, 1)
    reference = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    ids = torch.randint(100, 40000, (PROMPT,), generator=torch.Generator().manual_seed(0))
    kl = check(engine, reference, ids[:64])
    reference = reference.bfloat16()
    result: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "kl_to_transformers": kl}
    result |= {"prompt": PROMPT, "tokens": args.tokens, "bytes_per_token": engine.bytes_per_token, "rows": []}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bandwidth = read_bandwidth()
        seconds: dict[str, list[tuple[float, float]]] = {"engine": [], "transformers bf16": []}
        for _ in range(args.rounds):
            seconds["engine"].append(engine_seconds(engine, ids, args.tokens))
            seconds["transformers bf16"].append(transformers_seconds(reference, ids, args.tokens))
        for name, times in seconds.items():
            decode = [1 / step for _, step in times]
            size = engine.bytes_per_token if name == "engine" else 2 * sum(p.numel() for p in reference.parameters())
            result["rows"].append(
                {
                    "name": name,
                    "threads": threads,
                    "decode_tokens_per_second": statistics.median(decode),
                    "spread": [min(decode), max(decode)],
                    "prefill_tokens_per_second": PROMPT / statistics.median(first for first, _ in times),
                    "megabytes_per_token": size / 1e6,
                    "share_of_bandwidth": statistics.median(decode) * size / 1e9 / bandwidth,
                    "read_bandwidth_gb_per_second": bandwidth,
                }
            )
            print(result["rows"][-1], file=sys.stderr)
    return result


def main() -> None:
    """Parse, run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="export folder")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/results/bench_decode.json"))
    args = parser.parse_args()
    result = run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(
            f"{row['name']:<18} {row['threads']} threads  decode {row['decode_tokens_per_second']:.0f} tok/s  "
            f"prefill {row['prefill_tokens_per_second']:.0f} tok/s  {row['share_of_bandwidth']:.0%} of read bandwidth"
        )


if __name__ == "__main__":
    main()
