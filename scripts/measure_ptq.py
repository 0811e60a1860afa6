"""Perplexity of post-training quantization: schemes x methods on one model and text, in one process.

    .venv/bin/python scripts/measure_ptq.py --schemes w4a16_row,w4a16_g64 --methods rtn,rtn_mse,gptq

Calibration windows are drawn from the training part of the text, perplexity is taken on the held-out part. Each row
is appended to docs/results/ptq.json with seconds and the peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from qat import build, checks
from qat.cli.compose import compose_run
from qat.data import load_windows
from qat.evaluate.perplexity import score
from qat.insert import FakeQuantOptions, insert
from qat.memory import peak_memory_gib
from qat.ptq import squeezellm
from qat.ptq.apply import PtqReport, apply, check
from qat.ptq.blocks import find_blocks
from qat.ptq.options import PtqOptions
from qat.ptq.text import drawn
from qat.train.calibrate import calibrate


def by_tables(model: Any, floating: Any, train: Tensor, options: PtqOptions) -> tuple[PtqReport, int]:
    """SqueezeLLM on the decoder layers of `model`: what was done, and by how many bytes it differs from the plan's."""
    started = time.perf_counter()
    chosen = drawn(train, options.windows, 0)
    larger = squeezellm.quantize_blocks(model, copy.deepcopy(floating), chosen)
    layers = sum(len(block.targets) for block in find_blocks(model))
    return PtqReport("squeezellm", chosen.numel(), time.perf_counter() - started, layers, []), larger


def main() -> None:
    """Measure what the arguments name and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="w4a16_row,w4a16_g64,w4a16_g32,w3a16_g64,w2a16_g32")
    parser.add_argument("--methods", default="rtn,rtn_mse,gptq")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--short-fraction", type=float, default=0.5)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=Path("docs/results/ptq.json"))
    parser.add_argument("overrides", nargs="*", default=[])
    args = parser.parse_args()
    groups = ["model=smollm2_135m", "data=bible", f"data.eval_tokens={args.eval_tokens}"]
    config = compose_run([*groups, *args.overrides])
    build.use_machine(config)
    floating, tokenizer = build.float_model(config)
    windows = load_windows(config.data, tokenizer)
    rows = json.loads(args.output.read_text()) if args.output.is_file() else []
    evaluate = config.evaluate
    for scheme in args.schemes.split(","):
        for method in args.methods.split(","):
            model = copy.deepcopy(floating)
            plan = checks.plan_from(compose_run([*groups, *args.overrides, f"scheme={scheme}"]))
            coverage = insert(model, plan, FakeQuantOptions("ste_clipped", "static", "minmax"))
            calibrate(model, windows.train[:1], 1)
            options = PtqOptions(method, windows=args.windows, short_fraction=args.short_fraction)
            size = coverage.bytes
            if method == "squeezellm":
                report, change = by_tables(model, floating, windows.train, options)
                size += change
            else:
                check(model, coverage, windows.train, options)
                report = apply(model, windows.train, options)
            found = score(model, windows.evaluation, evaluate.batch_size, evaluate.precision, floating, method)
            row = {
                "scheme": scheme,
                "method": method,
                "perplexity": round(found.perplexity, 3),
                "float": round(found.reference_perplexity or 0.0, 3),
                "kl": round(found.kl or 0.0, 4),
                "bits_per_weight": round(8 * size / coverage.weights, 3),
                "windows": args.windows if report.tokens else 0,
                "short_fraction": args.short_fraction,
                "tokens": report.tokens,
                "seconds": round(report.seconds, 1),
                "peak_gib": round(peak_memory_gib(), 2),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
            args.output.write_text(json.dumps(rows, indent=1) + "\n")
            del model


if __name__ == "__main__":
    main()
