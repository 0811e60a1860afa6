"""PATH is a run folder (its own text and protocol, fake-quantized and packed) or an export folder (give the text).

qat evaluate runs/smollm2_quickstart
qat evaluate runs/smollm2_quickstart/export/compressed_tensors data=text data.path=FILE.txt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qat.errors import UserError, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """The path, and overrides of the data and evaluate groups."""
    parser.add_argument("path", type=Path, help="run folder or export folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data and evaluate settings")


def run(args: argparse.Namespace) -> int:
    """Print one JSON object with the scores."""
    from qat.cli.compose import compose_run, from_yaml

    resolved = args.path / "resolved.yaml"
    if resolved.is_file():
        if args.overrides:
            fix = "Name its export folder to score it on other text."
            raise UserError(problem("qat evaluate", "a run is scored on its own text", args.overrides[0], fix))
        config = from_yaml(resolved)
    elif (args.path / "config.json").is_file():
        # not through the command line's grammar, which cannot read every folder name
        config = compose_run(["model.path=unused", *args.overrides])
        config.model.path = str(args.path)
    else:
        fix = "Name runs/NAME or runs/NAME/export/compressed_tensors."
        raise UserError(problem(str(args.path), "must be a run or an export folder", "neither", fix))

    import torch

    from qat import pipeline
    from qat.data import load_windows
    from qat.evaluate.perplexity import score
    from qat.models import load_tokenizer
    from qat.serve.load import read_export, serve

    evaluate = config.evaluate
    is_run = resolved.is_file()
    export = args.path / "export" / config.export.format if is_run else args.path
    dtype = torch.bfloat16 if evaluate.precision == "bf16" else torch.float32
    windows = load_windows(config.data, load_tokenizer(config.model)).evaluation
    scores = {}
    if is_run:
        model, _ = pipeline.rebuild(config, args.path)
        scores["fake_quant"] = score(model, windows, evaluate.batch_size, evaluate.precision, title="evaluate QAT")
    packed = serve(read_export(export), dtype)
    scores["packed"] = score(packed, windows, evaluate.batch_size, evaluate.precision, title="evaluate packed")
    lines = {name: {"perplexity": s.perplexity, "tokens": s.tokens} for name, s in scores.items()}
    print(json.dumps({"text": config.data.path, "precision": evaluate.precision, **lines}, indent=2))
    return 0
