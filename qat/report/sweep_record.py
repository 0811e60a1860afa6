"""What a sweep folder says: its trials, what was measured of each, and which of them no other one beats.

`results.json` of a sweep is written by its driver after every trial; a trial's own numbers come from the results.json
of its run. Files only; no study, no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.errors import UserError, problem
from qat.report.record import is_number

# Dotted key in a run's results.json -> (what it is called, which way is better)
METRICS: dict[str, tuple[str, str]] = {
    "perplexity.packed": ("Perplexity, packed", "minimize"),
    "perplexity.fake_quant": ("Perplexity, fake-quantized", "minimize"),
    "kl_to_float.fake_quant": ("KL to float (nats per token)", "minimize"),
    "top1_to_float.fake_quant": ("Same most likely token as float", "maximize"),
    "recovery": ("Recovery", "maximize"),
    "bits_per_weight": ("Bits per weight", "minimize"),
    "bytes.packed": ("MB, packed", "minimize"),
    "seconds.step_median": ("Seconds per training step", "minimize"),
    "seconds.total": ("Seconds of the run", "minimize"),
    "tokens_per_second": ("Training tokens per second", "maximize"),
    "decode.tokens_per_second": ("Decoded tokens per second", "maximize"),
}


@dataclass(frozen=True)
class TrialRecord:
    """One trial. `metrics` holds what was measured, by dotted key; `reason` says why it did not complete.

    `state`: complete, pruned, failed, running, interrupted (the next driver takes it up) or waiting.
    """

    number: int
    state: str
    params: dict[str, Any]
    metrics: dict[str, float]
    minutes: float | None
    last_step: int | None
    reason: str | None
    folder: str


@dataclass(frozen=True)
class SweepRecord:
    """A sweep: its name and status, the objectives (metric -> direction), further metrics shown, and the trials."""

    path: Path
    name: str
    status: str
    objectives: dict[str, str]
    record: list[str]
    settings: dict[str, Any]
    trials: list[TrialRecord]

    def complete(self) -> list[TrialRecord]:
        """The trials that ran to their end, which are those with every objective."""
        return [trial for trial in self.trials if trial.state == "complete"]

    def best(self) -> TrialRecord | None:
        """The complete trial with the best first objective."""
        metric, direction = next(iter(self.objectives.items()))
        sign = 1 if direction == "minimize" else -1
        return min(self.complete(), key=lambda trial: sign * trial.metrics[metric], default=None)


def metric_value(results: dict[str, Any], metric: str) -> float | None:
    """The number under a dotted key of a run's results.json; None when it is not there or is no finite number."""
    here: Any = results
    for part in metric.split("."):
        here = here.get(part) if isinstance(here, dict) else None
    return float(here) if is_number(here) else None


def title_of(metric: str) -> str:
    """What a metric is called in tables and figures."""
    return METRICS[metric][0]


def in_unit(metric: str, value: Any) -> Any:
    """The value in the unit its title names: bytes become MB of 10^6. None stays None."""
    return value / 1e6 if value is not None and metric.startswith("bytes") else value


def pareto_front(trials: list[TrialRecord], directions: dict[str, str]) -> list[TrialRecord]:
    """The trials, among those with every metric, that no other one equals or beats in all metrics and beats in one."""
    known = [trial for trial in trials if all(metric in trial.metrics for metric in directions)]
    signs = {metric: 1 if direction == "minimize" else -1 for metric, direction in directions.items()}

    def costs(trial: TrialRecord) -> tuple[float, ...]:
        return tuple(sign * trial.metrics[metric] for metric, sign in signs.items())

    def beats(one: TrialRecord, other: TrialRecord) -> bool:
        a, b = costs(one), costs(other)
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [trial for trial in known if not any(beats(other, trial) for other in known)]


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is a sweep's rather than a run's."""
    return (folder / "sweep.yaml").is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """The sweep in `folder`.

    Raises:
        UserError: its results.json is missing or was not written by a sweep.
    """
    file = folder / "results.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        trials = [TrialRecord(**trial) for trial in content["trials"]]
        names = ("name", "status", "objectives", "record", "settings")
        return SweepRecord(path=folder, trials=trials, **{name: content[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = f"Run `qat sweep` with sweep.name={folder.name} again; it writes the file."
        raise UserError(problem(str(file), "must be what a sweep wrote", f"{type(error).__name__}", fix)) from None
