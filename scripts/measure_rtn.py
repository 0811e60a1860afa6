"""Perplexity on held-out text by round-to-nearest (ranges of least error), nothing trained: a JSON line per variant.

python scripts/measure_rtn.py recipe=smollm2_quickstart --variant "scheme=w3a16_g64" --variant "float kv=kv4"
Overrides of `qat train` hold for all variants; a variant is more of them, with spaces between, and `float` first keeps
every weight.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys

FLOAT = ["plan.rules=[{match: '*', scheme: keep}]", "plan.max_unsupported=1"]


def main(arguments: list[str] | None = None) -> int:
    """Load once, then round, score and print each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", required=True, help="overrides of one row")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args(arguments)
    from qat import build
    from qat.cli.compose import compose_run
    from qat.data import load_windows
    from qat.evaluate.perplexity import score
    from qat.train.calibrate import calibrate

    fixed = [*args.overrides, "fake_quant=static", "fake_quant.weight_observer=mse"]
    variants = [variant.split() for variant in args.variant]
    plans = [compose_run([*fixed, *(FLOAT if v[0] == "float" else v[:1]), *v[1:]]) for v in variants]
    model, tokenizer = build.float_model(plans[0])
    windows = load_windows(plans[0].data, tokenizer)
    for variant, config in zip(args.variant, plans, strict=True):
        rounded = copy.deepcopy(model)
        coverage = build.quantize_layers(rounded, config)
        calibrate(rounded, windows.train[: config.fake_quant.calibration_batches], 1)
        found = score(rounded, windows.evaluation, config.evaluate.batch_size, config.evaluate.precision)
        row = {"variant": variant, "perplexity": round(found.perplexity, 3), "tokens": found.tokens}
        linear = [
            layer for layer in coverage.layers if layer.kind != "embedding" and not layer.tied_to and layer.scheme
        ]
        if linear:
            row["linear_bits"] = round(8 * sum(la.bytes for la in linear) / sum(la.weights for la in linear), 3)
        print(json.dumps(row | {"bits_per_weight": round(coverage.bits_per_weight, 3)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
