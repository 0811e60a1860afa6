"""Where trials run: the table LAUNCHERS, and what a driver that died has left anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qat.config import RunConfig
from qat.sweep import jobs, slurm
from qat.sweep.jobs import Job, LocalJob, TrialJob, check_local
from qat.sweep.slurm import SlurmJob, check_slurm


@dataclass(frozen=True)
class Launcher:
    """`start` starts a trial; `check` names what trials like this run, so many of them side by side, lack here."""

    start: Callable[[TrialJob], Job]
    check: Callable[[RunConfig, int], list[str]]


# Name in sweep.launcher -> launcher
LAUNCHERS = {"local": Launcher(LocalJob, check_local), "slurm": Launcher(SlurmJob, check_slurm)}


def end_left_over(config_file: Path) -> None:
    """Stop whatever a dead driver left running on this configuration, also under another launcher.

    Raises:
        UserError: it does not end.
    """
    jobs.end_left_over(config_file)
    slurm.end_left_over(config_file)
