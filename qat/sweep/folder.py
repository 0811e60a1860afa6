"""The sweep folder: one driver at a time, one space for its whole life, and results.json for the report.

sweep.yaml      the space, objectives and run it was started with
sweep.lock      who drives it
study.journal   optuna's record
configs/        trial-0003.yaml, what the trial runs; trial-0003.log, what it said
trial-0003/     its run folder
results.json    every trial with its values; report.html, report.md, best.yaml and figures/ are made from it
"""

from __future__ import annotations

import difflib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qat.errors import UserError, problem
from qat.paths import write_json_atomic, write_text_atomic
from qat.sweep.config import SweepConfig
from qat.sweep.study import Study

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class SweepFolder:
    """runs_dir/name of a sweep."""

    path: Path

    def trial(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.path / trial_name(number)

    def config_file(self, number: int) -> Path:
        """What the trial is started with."""
        return self.path / "configs" / f"{trial_name(number)}.yaml"

    def log(self, number: int) -> Path:
        """What its processes say."""
        return self.path / "configs" / f"{trial_name(number)}.log"

    def write_results(self, config: SweepConfig, study: Study, status: str) -> None:
        """results.json: the sweep and every trial as they stand now."""
        # what the study still holds as running is, once the driver has ended, to be taken up again
        states = STATES | ({"RUNNING": "interrupted"} if status == "interrupted" else {})
        trials = []
        for trial in study.trials():
            facts = trial.user_attrs
            trials.append(
                {
                    "number": trial.number,
                    "state": states[trial.state.name],
                    "params": trial.params or trial.system_attrs.get("fixed_params", {}),
                    "metrics": facts.get("metrics", {}),
                    "minutes": facts.get("minutes"),
                    "last_step": max(trial.intermediate_values, default=None),
                    "reason": facts.get("reason"),
                    "folder": trial_name(trial.number),
                }
            )
        settings = {
            "sampler": config.sampler,
            "seed": config.seed,
            "trials": study.total,
            "parallel": config.parallel,
            "pruning": config.pruning.kind,
        }
        content = {
            "name": config.name,
            "status": status,
            "objectives": {objective.metric: objective.direction for objective in config.objectives},
            "record": list(config.record),
            "settings": settings,
            "trials": trials,
        }
        write_json_atomic(self.path / "results.json", content)


def trial_name(number: int) -> str:
    """trial-0003; also the name of its run in wandb."""
    return f"trial-{number:04d}"


@contextmanager
def claimed(path: Path, identity: str) -> Iterator[SweepFolder]:
    """The folder of a sweep for one driver: made when it is new, else the one to be continued.

    Args:
        identity: YAML of what may not change between calls (space, objectives, the run).
    Raises:
        UserError: it is no sweep folder, belongs to a sweep with another identity, cannot be written, or another
            driver is at work in it.
    """
    check_folder(path, identity)
    try:
        (path / "configs").mkdir(parents=True, exist_ok=True)
        lock = (path / "sweep.lock").open("a+")
    except OSError as error:
        fix = "Choose another runs_dir, or make it writable."
        raise UserError(problem(str(path), "must be a writable folder", error.strerror, fix)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            fix = "Wait for it, stop it, or choose another sweep.name."
            raise UserError(problem(str(path), "must have one driver", lock.read().strip(), fix)) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        if not (path / "sweep.yaml").exists():
            write_text_atomic(path / "sweep.yaml", identity)
        yield SweepFolder(path)


def check_folder(path: Path, identity: str) -> None:
    """Refuse a place that is not this sweep's; nothing is touched."""
    known = path / "sweep.yaml"
    if path.is_dir() and not known.is_file() and any(entry.name not in OWN_FILES for entry in path.iterdir()):
        fix = "Choose another sweep.name."
        raise UserError(problem(str(path), "must be a sweep folder", "a folder with other files", fix))
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(problem(str(path), "must be a folder", "a file", "Choose another sweep.name."))
    if known.is_file() and (before := known.read_text(encoding="utf-8")) != identity:
        changes = difflib.unified_diff(before.splitlines(), identity.splitlines(), "then", "now", lineterm="", n=0)
        shown = "\n  ".join(line for line in changes if not line.startswith(("---", "+++", "@@")))
        fix = "Go on with what it was started with, or choose another sweep.name."
        raise UserError(problem(str(path), "must go on with its own space and run", f"changes:\n  {shown}\n", fix))


# What a driver that was stopped at once may have left before sweep.yaml
OWN_FILES = ("configs", "sweep.lock")
