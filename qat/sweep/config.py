"""The schema of conf/sweep: what is varied, what is wanted of it, how many trials, and how they are run.

A doc line under each field. `check_sweep` names everything wrong with the values; whether each trial is a valid run is
checked where runs are composed, in `cli/compose_sweep.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qat.errors import nearest, problem
from qat.report.sweep_record import METRICS
from qat.sweep.launchers import LAUNCHERS

KINDS = ("choice", "int", "float")
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("off", "median", "hyperband")
WATCHED = ("validation.perplexity", "train.loss", "train.kl", "train.ce")
# What the sweep itself gives every trial
OWN_KEYS = ("name", "runs_dir", "overwrite", "logger.group")
SCALARS = (str, int, float, bool, type(None))


@dataclass
class ParameterConfig:
    key: str = "???"
    """A group (scheme) or a dotted key (optim.lr) of `qat train`."""
    kind: str = "choice"
    """choice (of values), int or float (from low to high)."""
    values: list[Any] = field(default_factory=list)
    """With kind=choice: what is tried."""
    low: float | None = None
    """With kind=int or float: the smallest value."""
    high: float | None = None
    """With kind=int or float: the largest value."""
    log: bool = False
    """With kind=int or float: draw, or space the grid, evenly in the logarithm."""
    points: int | None = None
    """With sampler=grid and kind=int or float: how many values from low to high, both counted."""


@dataclass
class ObjectiveConfig:
    metric: str = "???"
    """Dotted key in results.json of a run: perplexity.packed, bits_per_weight, bytes.packed, ..."""
    direction: str = "minimize"
    """minimize or maximize."""


@dataclass
class PruningConfig:
    kind: str = "off"
    """off, median (stop what is worse than the median of earlier trials at the same step) or hyperband."""
    watch: str = "validation.perplexity"
    """EVENT.KEY of metrics.jsonl compared while trials run; less is better."""
    warmup_steps: int = 1
    """Optimizer steps every trial is given."""
    startup_trials: int = 2
    """Trials that must have completed before any is stopped."""


@dataclass
class SweepConfig:
    name: str = "???"
    """The sweep folder is runs_dir/name."""
    space: list[ParameterConfig] = field(default_factory=list)
    """What is varied."""
    objectives: list[ObjectiveConfig] = field(default_factory=lambda: [ObjectiveConfig("perplexity.packed")])
    """What is wanted; the first one names the best trial."""
    record: list[str] = field(default_factory=lambda: ["bits_per_weight"])
    """Further metrics of results.json, shown beside the objectives and drawn against the first one."""
    trials: int | None = None
    """Trials in all, those of earlier calls counted; None with sampler=grid, which runs every combination."""
    sampler: str = "tpe"
    """tpe (learns from finished trials), random or grid."""
    seed: int = 0
    """Seed of the sampler; the seed of the runs is their own."""
    parallel: int = 1
    """Trials side by side."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """Which trials are stopped early."""
    launcher: str = "local"
    """Where trials run: local (processes of this machine) or slurm (each trial a job, with the settings of cluster)."""
    timeout_minutes: float | None = None
    """A trial that runs longer is stopped and counts as failed; waiting in a queue is not counted."""


def check_sweep(config: SweepConfig) -> list[str]:
    """A line for everything wrong with a sweep's own values, in the project's error form."""
    topics = (_name, _words, _numbers, _objectives, _pruning)
    problems = [line for topic in topics for line in topic(config)]
    if not config.space:
        problems.append(problem("sweep.space", "must hold a parameter", "none", "See conf/sweep/scheme_lr.yaml."))
    for place, parameter in enumerate(config.space):
        problems += _parameter(f"sweep.space.{place}", parameter, config.sampler)
    keys = [parameter.key for parameter in config.space]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        problems.append(problem("sweep.space", "must name a key once", f"{key} {keys.count(key)} times", "Join them."))
    return problems


def _name(config: SweepConfig) -> Iterator[str]:
    name = config.name
    if name in ("", ".", "..") or name != name.strip() or any(c in "/\\\0" for c in name):
        fix = "Use runs_dir for the folder above it."
        yield problem("sweep.name", "must be a plain folder name", f"'{name}'", fix)


def _words(config: SweepConfig) -> Iterator[str]:
    words = {
        "sweep.sampler": (config.sampler, SAMPLERS),
        "sweep.launcher": (config.launcher, tuple(LAUNCHERS)),
        "sweep.pruning.kind": ("off" if config.pruning.kind == "False" else config.pruning.kind, PRUNERS),
        "sweep.pruning.watch": (config.pruning.watch, WATCHED),
    }
    for key, (value, known) in words.items():
        if value not in known:
            yield problem(key, f"must be one of {', '.join(known)}", f"'{value}'", nearest(value, known))


def _numbers(config: SweepConfig) -> Iterator[str]:
    least = {"parallel": 1, "seed": 0, "trials": 1}
    for key, smallest in least.items():
        value = getattr(config, key)
        if value is not None and value < smallest:
            yield problem(f"sweep.{key}", f"must be at least {smallest}", value, f"Use sweep.{key}={smallest} or more.")
    minutes = config.timeout_minutes
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        yield problem("sweep.timeout_minutes", "must be finite and above 0", minutes, "Drop it for no limit.")
    if config.sampler == "grid" and config.trials is not None:
        fix = "Drop sweep.trials, or use sampler=random."
        yield problem("sweep.trials", "must not be given: a grid runs every combination", config.trials, fix)
    if config.sampler != "grid" and config.trials is None:
        yield problem("sweep.trials", f"must be given with sampler={config.sampler}", "none", "Add sweep.trials=20.")


def _objectives(config: SweepConfig) -> Iterator[str]:
    if not config.objectives:
        fix = "Use [{metric: perplexity.packed}]."
        yield problem("sweep.objectives", "must hold a metric", "none", fix)
    named = [*((f"sweep.objectives.{i}.metric", o.metric) for i, o in enumerate(config.objectives))]
    named += [(f"sweep.record.{i}", metric) for i, metric in enumerate(config.record)]
    for place, (where, metric) in enumerate(named):
        if metric not in METRICS:
            yield problem(where, "must be a metric of results.json", f"'{metric}'", nearest(metric, list(METRICS)))
        elif metric in [other for _, other in named[:place]]:
            yield problem(where, "must not be named before", f"'{metric}' again", "Drop it.")
    for i, objective in enumerate(config.objectives):
        better = METRICS.get(objective.metric, ("", objective.direction))[1]
        if objective.direction != better:
            where, fix = f"sweep.objectives.{i}.direction", f"Write direction: {better}."
            yield problem(where, f"{objective.metric} is better the other way", f"'{objective.direction}'", fix)


def _pruning(config: SweepConfig) -> Iterator[str]:
    pruning = config.pruning
    if pruning.warmup_steps < 1:
        yield problem("sweep.pruning.warmup_steps", "must be at least 1", pruning.warmup_steps, "Use 1 or more.")
    if pruning.startup_trials < 0:
        yield problem("sweep.pruning.startup_trials", "must be at least 0", pruning.startup_trials, "Use 2.")
    if pruning.kind in ("median", "hyperband") and len(config.objectives) > 1:
        fix = "Give one objective and name the others under sweep.record, or use sweep.pruning.kind='off'."
        yield problem("sweep.pruning", "compares trials by one objective", f"{len(config.objectives)} of them", fix)


def _parameter(where: str, parameter: ParameterConfig, sampler: str) -> Iterator[str]:
    """What is wrong with one entry of the space."""
    if parameter.key in OWN_KEYS:
        yield problem(f"{where}.key", "must not be what the sweep gives each trial", parameter.key, "Drop the entry.")
    if parameter.kind not in KINDS:
        yield problem(f"{where}.kind", f"must be one of {', '.join(KINDS)}", f"'{parameter.kind}'", "Use choice.")
        return
    has_range = (parameter.low, parameter.high, parameter.points) != (None, None, None) or parameter.log
    if parameter.kind == "choice":
        if has_range:
            fix = "Use kind: float or int, or give values only."
            yield problem(where, "a choice has values, not low, high, log or points", "them", fix)
        yield from _values(where, parameter.values)
        return
    if parameter.values:
        yield problem(where, f"kind={parameter.kind} has low and high, not values", parameter.values, "Use choice.")
    low, high = parameter.low, parameter.high
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high) and low < high):
        yield problem(where, "low and high must be finite, low below high", f"{low} and {high}", "Give both.")
    elif parameter.log and low <= 0:
        yield problem(f"{where}.low", "must be above 0 with log", low, "Use a small positive number.")
    elif parameter.kind == "int" and not (low.is_integer() and high.is_integer()):
        yield problem(
            where, "low and high must be whole numbers with kind=int", f"{low} and {high}", "Use kind: float."
        )
    if (sampler == "grid") != (parameter.points is not None):
        fix = "Add points: 3." if sampler == "grid" else "Drop points, or use sampler=grid."
        yield problem(f"{where}.points", "goes with sampler=grid, and only with it", parameter.points, fix)
    elif parameter.points is not None and parameter.points < 2:
        yield problem(f"{where}.points", "must be at least 2", parameter.points, "Both ends are counted.")


def _values(where: str, values: list[Any]) -> Iterator[str]:
    if not values:
        yield problem(f"{where}.values", "must hold a value", "none", "List what is to be tried.")
    for value in values:
        if not isinstance(value, SCALARS) or (isinstance(value, float) and not math.isfinite(value)):
            fix = "Make a group option (one YAML in conf) of it, and choose among options."
            yield problem(f"{where}.values", "must be numbers, words, true, false or null", value, fix)
    if any(value in values[:place] for place, value in enumerate(values)):
        yield problem(f"{where}.values", "must differ from one another", values, "Drop what is there twice.")


def grid(config: SweepConfig) -> list[dict[str, Any]]:
    """Every combination of a checked space with sampler=grid, the last key running fastest."""
    return _product({parameter.key: _points(parameter, parameter.points or 2) for parameter in config.space})


def corners(config: SweepConfig, most: int = 32) -> list[dict[str, Any]]:
    """Combinations that hold every choice and both ends of every range: all such, or when these are more than `most`
    a few that still hold each value once."""
    values = {parameter.key: _points(parameter, parameter.points or 2) for parameter in config.space}
    if math.prod(map(len, values.values())) <= most:
        return _product(values)
    longest = max(map(len, values.values()))
    # neighbours differ in every key, so that values meet in more ways than a plain zip gives
    return [{k: v[(i + j) % len(v)] for j, (k, v) in enumerate(values.items())} for i in range(longest)]


def _product(values: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def _points(parameter: ParameterConfig, count: int) -> list[Any]:
    """All values of a choice; `count` evenly spaced ones of a range, fewer where whole numbers coincide."""
    if parameter.kind == "choice":
        return list(parameter.values)
    assert parameter.low is not None and parameter.high is not None
    low, high = parameter.low, parameter.high
    shares = [place / (count - 1) for place in range(1, count - 1)]
    between = [low * (high / low) ** share if parameter.log else low + (high - low) * share for share in shares]
    points = [low, *between, high]
    if parameter.kind == "float":
        return points
    # the ends are whole; half a step up is the nearest whole number, and this file rounds no tensor
    return sorted({math.floor(point + 0.5) for point in points})
