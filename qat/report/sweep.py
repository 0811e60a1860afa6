"""The report of a sweep: report.html, report.md, and best.yaml, the best trial as a recipe. From files only."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

from qat.report.html import NOT_RUN, image, table, write_page
from qat.report.sweep_figures import write_sweep_figures
from qat.report.sweep_record import METRICS, SweepRecord, TrialRecord, in_unit, pareto_front, read_sweep, title_of
from qat.report.table import MISSING, markdown, number_text

# What belongs to the trial, not to the recipe: left to the defaults of the next run
OF_THE_TRIAL = ("runs_dir", "overwrite")


def write_sweep_report(folder: Path) -> list[Path]:
    """Write the report of the sweep in `folder`; the paths written. UserError when it holds no results.json."""
    record = read_sweep(folder)
    figures = write_sweep_figures(record)
    paths = [_write_page(record, figures), _write_markdown(record, figures)]
    best = write_best(record)
    return paths if best is None else [*paths, best]


def trial_rows(record: SweepRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and a row for each trial: number, state, settings, metrics, minutes, reason."""
    keys = list(dict.fromkeys(key for trial in record.trials for key in trial.params))
    metrics = [*record.objectives, *record.record]
    header = ("Trial", "State", *keys, *(title_of(name) for name in metrics), "Minutes", "Reason")
    rows = [
        (
            str(trial.number),
            trial.state,
            *(_setting(trial.params.get(key)) for key in keys),
            *(metric_text(name, trial.metrics.get(name)) for name in metrics),
            number_text(trial.minutes, ".2f"),
            trial.reason or "",
        )
        for trial in record.trials
    ]
    return header, rows


def metric_text(metric: str, value: float | None) -> str:
    """A metric's number as the tables write it"""
    value = in_unit(metric, value)
    return number_text(value, ",.4g" if value is None or abs(value) < 1000 else ",.0f")


def write_best(record: SweepRecord) -> Path | None:
    """best.yaml: every value of the best trial, as a recipe of its own name; None while no trial is complete.

    The trial's own resolved.yaml is the source, so that nothing is guessed.
    """
    best = record.best()
    source = None if best is None else record.path / best.folder / "resolved.yaml"
    if best is None or source is None or not source.is_file():
        return None
    values: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    values = {key: value for key, value in values.items() if key not in OF_THE_TRIAL}
    values["name"] = f"{record.name}_best"
    if isinstance(values.get("logger"), dict):
        values["logger"].pop("group", None)
    metric = next(iter(record.objectives))
    lines = [
        "# @package _global_",
        f"# The best of sweep {record.name}: {best.folder}, {metric} {best.metrics[metric]:.6g}",
        "#",
        f"# Command:   qat train recipe={record.path / 'best.yaml'}",
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
    ]
    path = record.path / "best.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _summary(record: SweepRecord) -> list[str]:
    """What a reader wants first, one sentence each."""
    states = [trial.state for trial in record.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    asked = ", ".join(f"{key} {value}" for key, value in record.settings.items())
    wanted = ", ".join(f"{direction} {metric}" for metric, direction in record.objectives.items())
    lines = [f"The sweep is {record.status}: {counts or 'no trial'}.", f"Asked: {wanted}; {asked}."]
    best = record.best()
    if best is not None:
        lines.append(f"Best: trial {best.number} ({_settings(best)}): {_metrics(best)}.")
    return lines


def _front(record: SweepRecord) -> list[TrialRecord]:
    """The trials that no other one beats in all objectives, further metrics of size counted as objectives."""
    directions = dict(record.objectives)
    directions |= {name: METRICS[name][1] for name in record.record}
    return pareto_front(record.complete(), directions)


def _write_page(record: SweepRecord, figures: dict[str, Path]) -> Path:
    header, rows = trial_rows(record)
    best = record.best()
    strong = [best is not None and trial.number == best.number for trial in record.trials]
    pictures = {name: image(name, path) for name, path in figures.items()}
    fronts = "".join(picture for name, picture in pictures.items() if name.startswith("pareto"))
    front = ", ".join(str(trial.number) for trial in _front(record))
    unbeaten = f"<p>Trials that no other beats in all metrics: {front}.</p>\n"
    sections = [
        ("Verdict", "".join(f"<p>{escape(line)}</p>\n" for line in _summary(record))),
        ("Trials", table(header, rows, strong) if rows else NOT_RUN),
        (
            "Pareto fronts",
            unbeaten + fronts if front else NOT_RUN,
        ),
        ("Parallel coordinates", pictures.get("parallel_coordinates", NOT_RUN)),
        ("History", pictures.get("history", NOT_RUN)),
        ("Space and run", f"<pre>{escape((record.path / 'sweep.yaml').read_text(encoding='utf-8'))}</pre>"),
    ]
    warning = ""
    if record.status != "finished":
        warning = f'<div class="warning" role="alert">Warning: the sweep is {escape(record.status)}.</div>\n'
    return write_page(record.path / "report.html", f"QAT sweep {record.name}", sections, warning)


def _write_markdown(record: SweepRecord, figures: dict[str, Path]) -> Path:
    header, rows = trial_rows(record)
    front = ", ".join(str(trial.number) for trial in _front(record)) or MISSING
    pictures = "\n".join(f"![{name.replace('_', ' ')}](figures/{path.name})" for name, path in figures.items())
    text = "\n\n".join(
        [
            f"# Sweep {record.name}",
            *_summary(record),
            f"Trials that no other beats in all metrics: {front}.",
            markdown(header, rows).rstrip(),
            pictures,
        ]
    )
    path = record.path / "report.md"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def _setting(value: object) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(trial: TrialRecord) -> str:
    return ", ".join(f"{key}={_setting(value)}" for key, value in trial.params.items())


def _metrics(trial: TrialRecord) -> str:
    return "; ".join(f"{title_of(name)} {metric_text(name, value)}" for name, value in trial.metrics.items())
