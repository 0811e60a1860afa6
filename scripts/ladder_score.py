"""Score what belongs to one finished run on several held-out texts, all by one function, against the float model.

    python scripts/ladder_score.py RUN --models float,rtn,gptq,packed --text play=play --text code=code

The run's own held-out text comes first; --text NAME=OVERRIDES are others, by overrides of the group data. Baselines are
those of the control (the float model where the run has no control), quantized by the run's plan, calibrated on its
training text. Every line printed is a JSON object: first the texts, then a model each, as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qat import build, checkpoint
from qat.cli.compose import compose_run, from_yaml
from qat.config import FakeQuantConfig, RunConfig
from qat.data import GRAM, TextWindows, fingerprint, load_windows, overlap
from qat.errors import UserError
from qat.evaluate.perplexity import score
from qat.memory import peak_memory_gib, return_freed_memory
from qat.ptq import squeezellm
from qat.ptq.text import drawn
from qat.serve.load import read_export, serve
from qat.stage_config import StagesConfig
from qat.train.calibrate import calibrate

OWN = "own"


def text_config(config: RunConfig, overrides: str) -> RunConfig:
    """The run with another text, cut as its own is."""
    words = [f"data={word}" if "=" not in word else word for word in overrides.split()]
    data = compose_run(["model.path=unused", "data.path=unused", *words]).data
    return replace(config, data=replace(data, block_size=config.data.block_size, eval_tokens=config.data.eval_tokens))


def load_texts(config: RunConfig, tokenizer: Any, others: dict[str, str]) -> dict[str, TextWindows]:
    """Name -> windows; the run's own text is `own`."""
    configs = {OWN: config} | {name: text_config(config, words) for name, words in others.items()}
    return {name: load_windows(c.data, tokenizer) for name, c in configs.items()}


def describe(texts: dict[str, TextWindows]) -> dict[str, Any]:
    """What was scored: tokens, fingerprint, and how much of it stands in the training text."""
    train = texts[OWN].train
    return {
        name: {
            "tokens": windows.eval_tokens,
            "fingerprint": fingerprint(windows)[:16],
            "overlap": {"tokens": GRAM, "share": overlap(train, windows.evaluation)},
        }
        for name, windows in texts.items()
    }


def baseline(config: RunConfig, model: Any, method: str, train: torch.Tensor) -> dict[str, Any]:
    """Quantize a float model in place by the run's plan and a post-training method; what was done."""
    started = time.perf_counter()
    is_plain = method in ("rtn", "squeezellm")
    ptq = replace(config.ptq, method="none" if is_plain else method, keep="weights")
    static = FakeQuantConfig(weight_scale="static", calibration_batches=config.fake_quant.calibration_batches)
    # calibrated with seed 0 for every seed of the training
    config = replace(config, ptq=ptq, fake_quant=static, stages=StagesConfig(), seed=0)
    floating = copy.deepcopy(model) if method == "squeezellm" else None
    coverage = build.rtn_layers(model, config) if method == "rtn" else build.quantize_layers(model, config)
    shown = train[: static.calibration_batches * config.trainer.batch_size]
    if floating is not None:
        calibrate(model, shown, config.trainer.batch_size)
        chosen = drawn(train, ptq.windows, 0)
        size, tokens = coverage.bytes + squeezellm.quantize_blocks(model, floating, chosen), chosen.numel()
        facts: dict[str, Any] = {"calibration_tokens": tokens, "bits_per_weight": 8 * size / coverage.weights}
    else:
        build.check_ptq(model, coverage, train, config)
        calibrate(model, shown, config.trainer.batch_size)
        done = build.apply_ptq(model, train, config)
        facts = {"calibration_tokens": done["tokens"] if done else 0}
    return facts | {"seconds": time.perf_counter() - started}


def scored(config: RunConfig, run: Path, names: list[str], others: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The texts, then each model with its scores; a baseline that cannot do the scheme says why."""
    floating, tokenizer = build.float_model(config)
    texts = load_texts(config, tokenizer, others)
    yield {"texts": describe(texts)}
    control, kept = floating, json.loads((run / "manifest.json").read_text()).get("control")
    if kept is not None:
        control = copy.deepcopy(floating)
        checkpoint.load_state(control, Path(kept) / checkpoint.WEIGHTS)
    dtype = torch.bfloat16 if config.evaluate.precision == "bf16" else torch.float32
    for name in names:
        facts: dict[str, Any] = {}
        try:
            if name == "packed":
                model = serve(read_export(run / "export" / config.export.format), dtype)
            elif name in ("float", "control"):
                model = floating if name == "float" else control
            else:
                model = copy.deepcopy(control)
                facts = baseline(config, model, name, texts[OWN].train)
        except UserError as error:
            yield {"model": name, "refused": error.problems}
            continue
        yield {"model": name, **facts, "texts": _on_all(config, model, floating, texts, name)}
        del model
        return_freed_memory()


def _on_all(config: RunConfig, model: Any, floating: Any, texts: dict[str, TextWindows], title: str) -> dict[str, Any]:
    found, evaluate = {}, config.evaluate
    for name, windows in texts.items():
        reference = None if model is floating else floating
        result = score(model, windows.evaluation, evaluate.batch_size, evaluate.precision, reference, f"{title} {name}")
        found[name] = {key: value for key, value in asdict(result).items() if key in ("perplexity", "kl", "top1")}
    return found


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--models", required=True, help="names with commas between")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=OVERRIDES")
    args = parser.parse_args()
    config = from_yaml(args.run / "resolved.yaml")
    build.use_machine(config)
    others = dict(text.split("=", 1) for text in args.text)
    for line in scored(config, args.run, args.models.split(","), others):
        print(json.dumps(line | {"peak_memory_gib": round(peak_memory_gib(), 2)}), flush=True)


if __name__ == "__main__":
    main()
