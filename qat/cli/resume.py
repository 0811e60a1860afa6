"""RUN is a folder that `qat train` made. The run goes on from its newest whole checkpoint, or from the stage it was in,
with its own configuration; a finished one is left alone. Settings that change no number of the training may be given
anew (processes, logging, checkpoints, evaluation, export); others only with --force.

  qat resume runs/smollm2_quickstart
  torchrun --nproc-per-node=2 -m qat.cli.main resume runs/mine
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.errors import UserError, problem

if TYPE_CHECKING:
    from qat.config import RunConfig, TrainerConfig

# what may differ from the run's beginning; `trainer.devices` and the like change at most the last bits
FREE = ("evaluate", "export", "logger", "cluster")
FREE_TRAINER = (
    *("accelerator", "strategy", "devices", "nodes", "threads", "gradient_checkpointing"),
    *("eval_every", "log_every", "layer_stats_every", "checkpoint_every", "checkpoint_keep"),
    *("max_skipped_steps", "loader_workers", "timeout_minutes", "start_timeout_minutes", "memory_gib"),
)
BATCH = ("batch_size", "accumulate")  # their product with the number of processes is compared instead
NEVER = ("scheme", "plan", "kv", "fake_quant", "model")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The run, settings to change, and whether others may differ."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--force", action="store_true", help="also with other text, seed, batch or schedule")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    """Check that what is asked goes on with this run, and do the rest of it."""
    from qat.cli.compose import from_yaml, to_yaml
    from qat.cli.train import show
    from qat.cluster.agreement import join

    resolved = args.run / "resolved.yaml"
    if not resolved.is_file():
        fix = "Name a folder that `qat train` made."
        raise UserError(problem(str(args.run), "must be a run folder", "no resolved.yaml", fix))
    before = from_yaml(resolved)
    config = from_yaml(resolved, args.overrides)
    _check_changes(before, config, args.force)
    # the folder may have been moved or named relatively
    config.runs_dir, config.name = str(args.run.absolute().parent), args.run.absolute().name
    if _status(args.run) == "finished":
        print(f"{args.run} is finished; nothing to do")
        return 0
    join(config)

    from qat import pipeline
    from qat.cli.memory import memory_explained
    from qat.progress import is_main

    with memory_explained(config):
        folder = pipeline.run(config, to_yaml(config), pipeline.Resume(args.force))
    if is_main():
        show(folder, config.export.format)
    return 0


def _check_changes(before: RunConfig, after: RunConfig, forced: bool) -> None:
    """Refuse what would make it another run."""
    old, new = (_flat(asdict(config), "") for config in (before, after))
    was, now = global_batch(before.trainer), global_batch(after.trainer)
    problems = []
    if was != now and not forced:
        fix = "Set trainer.batch_size and trainer.accumulate so that the product stays; only last bits will differ."
        wanted = f"this run sees {was} windows a step"
        problems.append(problem("batch_size * accumulate * devices * nodes", wanted, now, fix))
    for key in sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k)):
        group, _, rest = key.partition(".")
        if group in FREE or (group == "trainer" and rest in (*FREE_TRAINER, *BATCH)):
            continue
        if group in NEVER or not forced:
            fix = "Train it as a run of its own name, or leave the setting out"
            fix += "." if group in NEVER else "; --force goes on all the same, not bit for bit."
            problems.append(problem(key, f"this run has {old.get(key)}", new.get(key), fix))
    if problems:
        raise UserError(*problems)


def global_batch(trainer: TrainerConfig) -> int:
    """Windows of all processes in one optimizer step."""
    return trainer.batch_size * trainer.accumulate * trainer.devices * trainer.nodes


def _flat(content: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix[:-1]: content}
    return {key: value for name, part in content.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


def _status(run: Path) -> str | None:
    try:
        return json.loads((run / "run_status.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return None
