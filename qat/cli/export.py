"""Packs the final checkpoint of a run again, from its files alone; the scheme comes from the run, never from you.

qat export runs/smollm2_quickstart --overwrite
qat export runs/smollm2_quickstart --output elsewhere/model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qat.errors import UserError, problem


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run, where to, and whether an existing folder may be replaced."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="another folder than RUN/export/FORMAT")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the folder and print its path."""
    from qat.cli.compose import from_yaml

    resolved = args.run / "resolved.yaml"
    if not resolved.is_file():
        fix = "Name a folder that `qat train` made."
        raise UserError(problem(str(args.run), "must be a run folder", "no resolved.yaml", fix))
    config = from_yaml(resolved)
    config.export.overwrite = config.export.overwrite or args.overwrite
    output = args.output or args.run / "export" / config.export.format
    if output.exists() and not config.export.overwrite:
        raise UserError(problem(str(output), "must be a new folder", "one that exists", "Add --overwrite."))
    results_file = args.run / "results.json"
    if not results_file.is_file():
        fix = "Let `qat train` finish first."
        raise UserError(problem(str(results_file), "must exist", "no such file", fix))

    from qat import checks, pipeline
    from qat.convert import digests, pack_model
    from qat.export import write_export
    from qat.formats.folder import read_json
    from qat.models import load_config, load_tokenizer

    model, coverage = pipeline.rebuild(config, args.run)
    packed = pack_model(model, coverage, load_config(config.model).to_dict(), checks.kv_spec(config.kv))
    results = read_json(results_file)
    write_export(packed, digests(packed), load_tokenizer(config.model), output, config, results)
    print(output)
    return 0
