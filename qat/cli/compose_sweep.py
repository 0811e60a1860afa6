"""Command line and YAML -> SweepConfig and the run that it varies; a trial's values -> the run of that trial.

Words that begin with `sweep` describe the sweep, all others the run. Every corner of the space is composed and checked
before the first trial; everything wrong is reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.cli.compose import (
    compose_run,
    is_file_name,
    option_problems,
    read_overrides,
    read_yaml,
    set_value,
    to_object,
    to_yaml,
)
from qat.cli.groups import RECIPES, SWEEP
from qat.config import RunConfig, conf_dir
from qat.errors import UserError, problem
from qat.sweep.config import SweepConfig, check_sweep, corners
from qat.sweep.folder import trial_name
from qat.sweep.launchers import LAUNCHERS

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class SweepSchema:
    """`sweep.trials=6` as a key."""

    sweep: SweepConfig = field(default_factory=SweepConfig)


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep. `base` is the run at the first corner of the space."""

    config: SweepConfig
    overrides: list[str]
    base: RunConfig

    @property
    def folder(self) -> Path:
        """The sweep folder."""
        return Path(self.base.runs_dir) / self.config.name

    def identity(self) -> str:
        """YAML of what must not change while the sweep lives: space, objectives, and the run with what decides its
        numbers."""
        import yaml

        run = asdict(self.base)
        for key in ("name", "runs_dir", "overwrite", "logger", "cluster"):
            del run[key]
        del run["trainer"]["threads"]
        config = asdict(self.config)
        return yaml.safe_dump(
            {"space": config["space"], "objectives": config["objectives"], "run": run}, sort_keys=False
        )

    def trial(self, number: int, params: dict[str, Any]) -> tuple[RunConfig, str]:
        """The run of one trial and its YAML; UserError when these values make none."""
        fixed: dict[str, Any] = {"name": trial_name(number), "runs_dir": str(self.folder), "overwrite": True}
        share = self.config.parallel if self.config.launcher == "local" else 1
        if self.base.trainer.threads is None and share > 1:
            fixed["trainer.threads"] = max(1, (os.cpu_count() or 1) // share)
        if self.base.logger.wandb != "off":
            fixed["logger.group"] = self.config.name
        run = compose_run(self.overrides, values_for_run(params) | fixed)
        return run, to_yaml(run)


def compose_sweep(words: Sequence[str]) -> SweepPlan:
    """The checked sweep and run that `words` describe: `sweep=NAME or FILE.yaml`, `sweep.key=value`, and the words of
    `qat train`.

    Raises:
        UserError: every problem found, in the sweep's own values first, else at the corners of its space.
    """
    own = [word for word in words if word.partition("=")[0].lstrip("+").partition(".")[0] == SWEEP]
    overrides = [word for word in words if word not in own]
    config = sweep_config(own)
    problems = check_sweep(config) + given_twice(config, overrides)
    if problems:
        raise UserError(*problems)
    base = rehearse(config, overrides)
    problems = LAUNCHERS[config.launcher].check(base, config.parallel)
    if config.pruning.kind != "off" and config.pruning.watch.startswith("validation") and not base.trainer.eval_every:
        fix = "Set trainer.eval_every, or watch train.loss."
        problems.append(problem("sweep.pruning.watch", "needs validation lines: trainer.eval_every above 0", 0, fix))
    measured = [*(objective.metric for objective in config.objectives), *config.record]
    if "decode.tokens_per_second" in measured and not base.evaluate.decode_tokens:
        fix = "Add evaluate.decode_tokens=64."
        problems.append(problem("decode.tokens_per_second", "needs evaluate.decode_tokens above 0", 0, fix))
    if problems:
        raise UserError(*problems)
    return SweepPlan(config, overrides, base)


def sweep_config(words: Sequence[str]) -> SweepConfig:
    """The sweep's own values, not yet checked; UserError for what is unknown, missing or of the wrong type."""
    from omegaconf import OmegaConf

    chosen = [word.partition("=")[2] for word in words if word.startswith(f"{SWEEP}=")]
    if len(chosen) != 1:
        got = "nothing" if not chosen else f"{len(chosen)} of them"
        raise UserError(
            problem(SWEEP, "must be given once", got, "Add sweep=NAME (see `qat ls sweeps`) or sweep=FILE.")
        )
    is_file = is_file_name(chosen[0])
    problems = [] if is_file else option_problems(SWEEP, chosen[0])
    given, more = read_overrides([word for word in words if not word.startswith(f"{SWEEP}=")], SweepSchema)
    problems += more
    config = OmegaConf.structured(SweepSchema)
    if not problems:
        file = Path(chosen[0]) if is_file else conf_dir() / SWEEP / f"{chosen[0]}.yaml"
        content, problems = read_yaml(file, SweepConfig)
        if not problems:
            config.merge_with({SWEEP: content})
            for key, value in given.items():
                problems += set_value(config, key, value, "", SweepSchema)
    if problems:
        raise UserError(*problems)
    made, missing = to_object(config, SweepSchema)
    if missing:
        raise UserError(*missing)
    return made.sweep


def given_twice(config: SweepConfig, overrides: Sequence[str]) -> list[str]:
    """A line for every word of the run that the sweep or a trial sets itself."""
    given = {word.partition("=")[0].lstrip("+") for word in overrides}
    varied = given & {parameter.key for parameter in config.space}
    problems = [
        problem(key, "must be set by the sweep or on the command line", "both", "Drop one.") for key in sorted(varied)
    ]
    for key in sorted(given & {"name", "overwrite", "logger.group"}):
        fix = "Use sweep.name; trials are named by their numbers."
        problems.append(problem(key, "must not be given: each trial has its own", "a value", fix))
    return problems


def rehearse(config: SweepConfig, overrides: Sequence[str]) -> RunConfig:
    """Compose every corner of the space; the run at the first one.

    Raises:
        UserError: each different problem once, with the values that showed it first.
    """
    first: RunConfig | None = None
    problems: dict[str, str] = {}
    composed: dict[str, DictConfig] = {}
    for params in corners(config):
        try:
            run = compose_run(list(overrides), values_for_run(params), composed)
            first = first or run
        except UserError as error:
            at = " ".join(f"{key}={value}" for key, value in params.items())
            problems |= {line: f"{line} (with {at})" for line in error.problems if line not in problems}
    if problems or first is None:
        raise UserError(*problems.values())
    return first


def values_for_run(params: dict[str, Any]) -> dict[str, Any]:
    """What `compose_run` takes: a recipe is a group with a name of its own."""
    return {RECIPES if key == "recipe" else key: value for key, value in params.items()}
