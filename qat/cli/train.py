"""Overrides are Hydra's: group=option (scheme=w4a16_g32), recipe=NAME or recipe=FILE.yaml, key=value
(trainer.max_steps=200). `qat ls groups` lists the groups; --cfg prints the whole configuration and stops.

  qat train recipe=smollm2_quickstart
  qat train model.path=FOLDER data=text data.path=FILE.txt scheme=w4a16_g64 name=mine
  qat train --config-file runs/mine/resolved.yaml name=again
  torchrun --nproc-per-node=2 -m qat.cli.main train recipe=... trainer=ddp
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides, or a whole run in a file, and --cfg."""
    parser.add_argument(
        "--config-file", metavar="FILE", help="run what a resolved.yaml says, with dotted.key=value set anew"
    )
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Compose, check, train; the last lines are the table, the verdict, the folder and what to type next."""
    from qat.cli.compose import compose_run, from_yaml, to_yaml
    from qat.cluster.agreement import check_layout, join
    from qat.progress import is_main
    from qat.run_folder import check_free

    given = args.overrides
    config = from_yaml(args.config_file, given) if args.config_file else compose_run(given)
    resolved = to_yaml(config)
    if args.cfg:
        print(resolved)
        return 0
    check_layout(config)
    if is_main():
        check_free(Path(config.runs_dir) / config.name, config.overwrite)
    join(config)

    from qat import pipeline
    from qat.cli.memory import memory_explained

    with memory_explained(config):
        folder = pipeline.run(config, resolved)
    if is_main():
        show(folder, config.export.format)
    return 0


def show(run_folder: Path, export_format: str) -> None:
    """The closing table of a run."""
    import json

    from rich.console import Console

    from qat.report.table import render_table

    results, parity = (json.loads((run_folder / name).read_text()) for name in ("results.json", "parity.json"))
    console = Console()
    console.print(render_table(results, parity))
    for item in results["answers"]:
        console.print(f"> {item['prompt']}\n  {item['answer']}", markup=False, highlight=False)
    lines = [
        f"run folder: {run_folder}",
        f"report:     {run_folder / 'report.html'}",
        f'next:       qat generate {run_folder / "export" / export_format} "Your question"',
    ]
    for line in lines:
        print(line)
