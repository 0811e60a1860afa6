"""What surviving costs: the training step with and without checkpoints, signals and status, in one run, alternating.

    python scripts/bench_overhead.py [--steps 8] [--rounds 5] [--threads 2] [--noisy] [overrides of qat train ...]

The recipe smollm2_quickstart through the training loop itself, three ways: bare (nothing is saved, no signal is heard),
polled (a held run folder, signals asked for at every step), saving (a checkpoint every second step too). Whole steps
are compared round by round; what the callback takes is also timed alone, since a share below one percent drowns in the
noise of steps. Saving is divided by the default interval. Nothing is printed when the losses are not the same to the
last bit, or when others use the machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_machine import BUSY_LIMIT, check_quiet, describe

WAYS = ("bare", "polled", "saving")
EVERY = 2  # steps between checkpoints where saving is timed
RECIPE = ["recipe=smollm2_quickstart", "trainer.layer_stats_every=0", "trainer.eval_every=0"]


class Clock:
    """Stands in for metrics.jsonl: the time and the loss of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def truncate(self, step: int) -> None:
        """No lines, nothing to drop."""

    def write(self, event: str, step: int, **values: Any) -> None:
        """Note the end of a step."""
        if event == "train":
            self.times.append(time.perf_counter())
            self.losses.append(values["loss"])

    @property
    def seconds(self) -> list[float]:
        """Of every step but the first: from one line to the next, so with all that callbacks do after it."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


@contextmanager
def timed_callback(spent: list[float]) -> Iterator[None]:
    """Every call at the end of a step adds its seconds to `spent`."""
    from qat.train.callbacks import CheckpointCallback

    own = CheckpointCallback.on_train_batch_end

    def timed(self: Any, *given: Any) -> None:
        started = time.perf_counter()
        own(self, *given)
        spent.append(time.perf_counter() - started)

    CheckpointCallback.on_train_batch_end = timed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        CheckpointCallback.on_train_batch_end = own  # type: ignore[method-assign]


def train(way: str, config: Any, made: tuple[Any, Any, Any], folder: Path) -> dict[str, Any]:
    """One short training: seconds and loss of steps, seconds in the callback, bytes of a checkpoint."""
    from qat import build
    from qat.checkpoints import Checkpoints
    from qat.train.fit import fit

    student, teacher, windows = made
    clock: Any = Clock()
    spent: list[float] = []
    checkpoints = None if way == "bare" else Checkpoints(folder / "checkpoints")
    config.trainer.checkpoint_every = EVERY if way == "saving" else 0
    with timed_callback(spent):
        options = build.training(config)
        fit(copy.deepcopy(student), teacher, windows, **options, metrics=clock, checkpoints=checkpoints)
    size = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))
    kept = len(list(folder.glob("checkpoints/step-*")))
    return {"seconds": clock.seconds, "losses": clock.losses, "spent": spent, "bytes": size // max(1, kept)}


def prepare(config: Any) -> tuple[Any, Any, Any]:
    """The student with its grids, the teacher, and the training windows, as a run makes them."""
    from qat import pipeline
    from qat.train.calibrate import calibrate
    from qat.train.fit import as_teacher

    student, _, windows, _, floating = pipeline._prepare(config)
    calibrate(student, windows.train[: config.trainer.batch_size], config.trainer.batch_size)
    return student, as_teacher(floating, config.trainer.precision), windows.train


def status_seconds(config: Any, folder: Path) -> float:
    """Median seconds of one run_status.json, in a folder that is claimed and held as a run's."""
    from qat.run_folder import RunFolder

    config.runs_dir, config.name = str(folder), "run"
    held = RunFolder.create(config, "", config.trainer.threads or 1)
    times = []
    for step in range(20):
        started = time.perf_counter()
        held.stage("training", step)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def same_losses(losses: dict[str, list[float]]) -> None:
    """Refuse to report when looking and saving changed what is computed."""
    if any(found != losses["bare"] for found in losses.values()) or not losses["bare"]:
        raise SystemExit(f"the losses of the three ways are not the same, no numbers: {losses}")


def measure(config: Any, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds; the first is warm-up."""
    from qat.config import TrainerConfig

    made = prepare(config)
    status = status_seconds(copy.deepcopy(config), folder)
    medians: dict[str, list[float]] = {way: [] for way in WAYS}
    polls, saves, size = [], [], 0
    for number in range(args.rounds + 1):
        found = {}
        for way in WAYS:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            found[way] = train(way, config, made, folder)
            print(f"round {number} {way}: {statistics.median(found[way]['seconds']):.3f} s", file=sys.stderr)
        same_losses({way: found[way]["losses"] for way in WAYS})
        if number:
            for way in WAYS:
                medians[way].append(statistics.median(found[way]["seconds"]))
            polls += found["polled"]["spent"]
            saves += found["saving"]["spent"][EVERY - 1 :: EVERY]
            size = found["saving"]["bytes"]
    step, every = statistics.median(medians["bare"]), TrainerConfig().checkpoint_every
    rows = []
    for way in WAYS:
        ratios = [own / bare for own, bare in zip(medians[way], medians["bare"], strict=True)]
        row = {"name": way, "median_seconds": statistics.median(medians[way]), "ratio": statistics.median(ratios)}
        rows.append(row | {"spread": [min(ratios), max(ratios)]})
    poll, save = statistics.median(polls), statistics.median(saves)
    return {
        "rows": rows,
        "poll_seconds": poll,
        "save_seconds": save,
        "save_bytes": size,
        "every": every,
        "status_seconds": status,
        "poll_share": poll / step,
        "save_share": save / every / step,
        "share": (poll + save / every) / step,
    }


def main() -> None:
    """Parse, run, write, print."""
    from qat.cli.compose import compose_run
    from qat.memory import keep_freed_memory
    from qat.report.table import overhead_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--noisy", action="store_true", help="measure beside other work, and mark the result")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where checkpoints are written and removed")
    parser.add_argument("--output", type=Path, default=Path("docs/results/bench_overhead.json"))
    parser.add_argument("overrides", nargs="*", help="of qat train")
    args = parser.parse_args()
    if args.steps < 2 * EVERY:
        parser.error(f"--steps must be at least {2 * EVERY}")
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    config = compose_run([*RECIPE, f"trainer.max_steps={args.steps}", *args.overrides])
    quiet = check_quiet(args.noisy) <= BUSY_LIMIT
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(config, args, Path(folder))
    about = {"machine": describe(), "quiet": quiet, "threads": args.threads, "model": config.model.path}
    about |= {"tokens": config.data.block_size * config.trainer.batch_size * config.trainer.accumulate}
    result = about | {"scheme": config.scheme.name, "steps": args.steps, "rounds": args.rounds} | result
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(overhead_table(result))


if __name__ == "__main__":
    main()
