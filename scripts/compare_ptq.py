"""Our GPTQ and AWQ beside llm-compressor's: the same blocks, grids and calibration text.

    make bench-ptq

The first two decoder blocks of SmolLM2-135M are quantized by both, windows of one length; the error is that of the
blocks' output, relative to its power, on the calibration text and on held-out text. `layers` compares GPTQ on single
layers: both solve for the same float inputs. llm-compressor stays out of the environment (build/ptq-peers); results
are written to docs/results/ptq_peers.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qat import build, checks
from qat.cli.compose import compose_run
from qat.data import load_windows
from qat.grid import fake_quantize
from qat.insert import FakeQuantOptions, insert
from qat.progress import say
from qat.ptq import gptq
from qat.ptq.apply import apply, check
from qat.ptq.blocks import enter, find_blocks
from qat.ptq.options import PtqOptions
from qat.ptq.ranges import from_extremes, search
from qat.train.calibrate import calibrate

SCHEMES: dict[str, tuple[int, int | None]] = {"w4a16_g64": (4, 64), "w3a16_g64": (3, 64), "w4a16_row": (4, None)}


def main() -> None:
    """Compare, print a line for each, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("docs/results/ptq_peers.json"))
    args = parser.parse_args()
    config = compose_run(["model=smollm2_135m", "data=bible", "data.eval_tokens=4096"])
    build.use_machine(config)
    model, tokenizer = build.float_model(config)
    windows = load_windows(config.data, tokenizer)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    order = torch.randperm(len(windows.train), generator=torch.Generator().manual_seed(0))
    shown = windows.train[order[: args.windows]]
    texts = {"calibration": shown, "held out": windows.evaluation}
    rows: dict[str, Any] = {"peer": f"llmcompressor {version('llmcompressor')}", "windows": args.windows}
    rows["layers"] = [row for scheme in SCHEMES for row in compare_layers(model, scheme, shown)]
    rows["blocks"] = []
    for scheme in SCHEMES:
        rows["blocks"] += compare_blocks(model, scheme, shown, texts)
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


def inserted(model: Any, scheme: str) -> tuple[Any, Any]:
    """A copy with our training layers in the blocks and float embeddings."""
    ours = copy.deepcopy(model)
    plan = checks.plan_from(compose_run(["model.path=m", "data.path=d", f"scheme={scheme}", "plan.embedding=keep"]))
    coverage = insert(ours, plan, FakeQuantOptions("ste_clipped", "static", "minmax"))
    calibrate(ours, torch.zeros(1, 8, dtype=torch.int64), 1)
    return ours, coverage


@torch.no_grad()
def error(model: Any, reference: Any, ids: Tensor) -> float:
    """Squared difference of the last block's output, as a share of its power."""
    lost = power = 0.0
    for batch in ids.split(4):
        there = reference.model(batch).last_hidden_state
        lost += float((model.model(batch).last_hidden_state - there).square().sum())
        power += float(there.square().sum())
    return lost / power


def compare_blocks(model: Any, scheme: str, shown: Tensor, texts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Both blocks by each method of ours and theirs."""
    rows = []
    for name in ("rtn", "gptq", "peer gptq", "awq", "peer awq"):
        make = theirs if name.startswith("peer") else ours
        quantized = make(model, scheme, shown, name.removeprefix("peer "))
        found = {part: error(quantized, model, ids) for part, ids in texts.items()}
        rows.append({"scheme": scheme, "method": name, **{part: round(value, 6) for part, value in found.items()}})
        say(json.dumps(rows[-1]))
    return rows


def ours(model: Any, scheme: str, shown: Tensor, method: str) -> Any:
    """The model by our method."""
    quantized, coverage = inserted(model, scheme)
    options = PtqOptions(method, windows=len(shown), short_fraction=0.0)
    check(quantized, coverage, shown, options)
    apply(quantized, shown, options)
    return quantized


def theirs(model: Any, scheme: str, shown: Tensor, method: str) -> Any:
    """The model by llm-compressor's method, with its own range search."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    # it pins memory for a GPU, which raises on a machine without one
    IntermediatesCache.pin_memory = lambda *args: None

    bits, size = SCHEMES[scheme]
    groups = {"group_0": {"targets": ["Linear"], "weights": {**peer_grid(bits, size), "observer": "memoryless_mse"}}}
    if method == "gptq":
        recipe: list[Any] = [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static")]
    else:
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in shown]
    peer = copy.deepcopy(model)
    oneshot(
        model=peer,
        dataset=DataLoader(rows, batch_size=1),  # type: ignore[arg-type]
        recipe=recipe,
        num_calibration_samples=len(shown),
        max_seq_length=shown.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    return peer


def peer_grid(bits: int, size: int | None) -> dict[str, Any]:
    """Our grid in compressed-tensors' words."""
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return {"num_bits": bits, "type": "int", "symmetric": True, **strategy}


def compare_layers(model: Any, scheme: str, shown: Tensor) -> list[dict[str, Any]]:
    """tr(E H E^T) of the layers of block 1 after GPTQ, ours and llm-compressor's, as a share of RTN's."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    quantized, _ = inserted(model, scheme)
    blocks = find_blocks(quantized)
    for block in blocks:
        for target in block.targets.values():
            target.quantizing(False)
    enter(quantized, blocks, list(shown.split(2)))
    block = blocks[1]
    block.inputs = blocks[0].outputs()
    rows = []
    for names in block.stages():
        hessian = block.gram(names)
        order, factor = gptq.factorize(hessian, 0.01, True, names[0])
        for name in names:
            target = block.targets[name]
            weight, spec = target.weight(), target.spec

            def loss(rounded: Tensor, weight: Tensor = weight, hessian: Tensor = hessian) -> float:
                return float((((rounded - weight) @ hessian) * (rounded - weight)).sum())

            grids = {"extremes": from_extremes(weight, spec), "least error": search(weight, spec)}
            rtn = loss(fake_quantize(weight, grids["extremes"], spec, torch.float32))
            row: dict[str, Any] = {"scheme": scheme, "layer": name}
            args = QuantizationArgs(**peer_grid(*SCHEMES[scheme]), actorder="static")
            for grid_name, qparams in grids.items():
                row[f"ours, {grid_name}"] = loss(gptq.solve(weight, qparams, spec, order, factor)[0]) / rtn
                tensors = (weight.clone(), hessian.clone(), *qparams)
                peer, _, _ = quantize_weight(*(tensor[None] for tensor in tensors), None, args)
                row[f"peer, {grid_name}"] = loss(peer[0]) / rtn
            rows.append({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()})
            say(json.dumps(rows[-1]))
    return rows


if __name__ == "__main__":
    main()
