"""MODEL is a folder, a hub name, a .gguf file or the name of a model in conf/model. Overrides are those of `qat train`;
method=NAME chooses among `qat ls methods`. Text is needed for perplexity, and by gptq and awq to calibrate:
windows are drawn from its training part, perplexity is taken on the held-out part.

  qat quantize smollm2_135m scheme=w4a16_g64 method=gptq data=bible
  qat quantize FOLDER scheme=w4a16_g32 method=awq data=text data.path=FILE.txt ptq.windows=64 name=mine
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """The model and overrides."""
    parser.add_argument("model", help="folder, hub name, .gguf file, or a name in conf/model")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Compose a run without training, do it, and show the closing table."""
    from qat.cli.compose import compose_run, to_yaml
    from qat.cli.train import show
    from qat.run_folder import check_free

    config = compose_run(as_overrides(args.model, args.overrides))
    check_free(Path(config.runs_dir) / config.name, config.overwrite)

    from qat import pipeline
    from qat.cli.memory import memory_explained

    with memory_explained(config):
        folder = pipeline.run(config, to_yaml(config))
    show(folder, config.export.format)
    return 0


def as_overrides(model: str, given: list[str]) -> list[str]:
    """The overrides of `qat train` for quantizing `model` without training; what the user gave counts."""
    from qat.cli.groups import options
    from qat.errors import UserError, nearest, problem

    if "=" in model:
        fix = "Write qat quantize MODEL key=value ..."
        raise UserError(problem("qat quantize", "needs a model before the overrides", f"'{model}'", fix))
    known = [file.stem for file in options("ptq") if file.stem != "none"]
    chosen = dict(word.split("=", 1) for word in given if "=" in word)
    method = chosen.get("method", "gptq")
    if method not in known:
        raise UserError(problem("method", f"must be one of {', '.join(known)}", f"'{method}'", nearest(method, known)))
    rest = [word for word in given if not word.startswith("method=")]
    is_named = model in [file.stem for file in options("model")]
    scheme = chosen.get("scheme", "w4a16_g32")
    stem = Path(model).name.removesuffix(".gguf")
    fixed = {
        "name": f"{stem}_{scheme}_{method}",
        "model" if is_named else "model.path": model,
        "ptq": method,
        "fake_quant": "static",
        "fake_quant.weight_observer": "minmax",
        "trainer.max_steps": "0",
    }
    return [f"{key}={value}" for key, value in fixed.items() if key not in chosen] + rest
