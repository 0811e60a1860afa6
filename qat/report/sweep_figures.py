"""The figures of a sweep as PNG files in its `figures` folder: parallel coordinates, Pareto fronts, and what came when.

Drawn from a SweepRecord only, in the style of `figures.py`. A figure whose data are missing is not drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.report.figures import BLUE, GREY, LIGHT, ORANGE, RED, STYLE, WIDTH, log_axis
from qat.report.record import is_number
from qat.report.sweep_record import METRICS, SweepRecord, TrialRecord, in_unit, pareto_front, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A range of positive numbers that spans more than this is drawn in the logarithm.
LOG_ABOVE = 8
# Behind labels that lines cross
PLATE: Any = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}


def write_sweep_figures(record: SweepRecord) -> dict[str, Path]:
    """Draw what the sweep has data for into `figures/`; name -> path in the order of the page."""
    import matplotlib

    first, *others = [*record.objectives, *record.record]
    folder, paths = record.path / "figures", {}
    with matplotlib.rc_context(STYLE):
        drawn = {"parallel_coordinates": draw_parallel_coordinates(record), "history": draw_history(record)}
        drawn |= {f"pareto_{other.replace('.', '_')}": draw_pareto(record, first, other) for other in others}
        for name, figure in drawn.items():
            if figure is None:
                continue
            folder.mkdir(exist_ok=True)
            path, beside = folder / f"{name}.png", folder / f"{name}.tmp"
            figure.savefig(beside, format="png")
            os.replace(beside, path)
            paths[name] = path
    return paths


def draw_pareto(record: SweepRecord, metric: str, other: str) -> Figure | None:
    """Every complete trial by two metrics; those that no other one beats are joined."""
    trials = [trial for trial in record.complete() if metric in trial.metrics and other in trial.metrics]
    if not trials:
        return None
    front = sorted(
        pareto_front(trials, {name: METRICS[name][1] for name in (metric, other)}), key=lambda t: t.metrics[other]
    )
    figure, axes = _figure(4.2)

    def place(trial: TrialRecord) -> tuple[float, float]:
        return in_unit(other, trial.metrics[other]), in_unit(metric, trial.metrics[metric])

    # between two trials of the front, only the one that costs no more is to be had
    side = "post" if METRICS[other][1] == "minimize" else "pre"
    axes.step(*zip(*map(place, front), strict=True), where=side, color=BLUE, linewidth=1.2, zorder=1)
    rest = [trial for trial in trials if trial not in front]
    for group, color, label in ((rest, GREY, "beaten"), (front, BLUE, "not beaten by any other")):
        if group:
            axes.scatter(*zip(*map(place, group), strict=True), s=46, c=color, label=label, zorder=2)
    for trial in front if len(front) <= 12 else (front[0], front[-1]):
        axes.annotate(f"{trial.number}", place(trial), (5, 5), textcoords="offset points", fontsize=9)
    if is_wide([trial.metrics[metric] for trial in trials]):
        axes.set_yscale("log")
        log_axis(axes.yaxis)
    axes.margins(0.1)
    axes.set_xlabel(f"{title_of(other)} ({better(other)})")
    axes.set_ylabel(f"{title_of(metric)} ({better(metric)})")
    axes.set_title(f"{title_of(metric)} against {title_of(other)}; numbers are trials")
    axes.legend()
    return figure


def draw_history(record: SweepRecord) -> Figure | None:
    """The first objective by trial number, the best so far, and where trials were stopped or failed."""
    metric, direction = next(iter(record.objectives.items()))
    done = [(trial.number, in_unit(metric, trial.metrics[metric])) for trial in record.complete()]
    if not done:
        return None
    pick = min if direction == "minimize" else max
    best = [pick(value for _, value in done[: place + 1]) for place in range(len(done))]
    figure, axes = _figure(3.4)
    axes.step([number for number, _ in done], best, where="post", color=ORANGE, label="best so far")
    axes.scatter(*zip(*done, strict=True), c=BLUE, s=40, zorder=3, label="complete")
    for state, color, marker in (("pruned", GREY, "|"), ("failed", RED, "x")):
        numbers = [trial.number for trial in record.trials if trial.state == state]
        if numbers:
            # below the axis: they have no value
            where = [0.02] * len(numbers)
            axes.scatter(
                numbers, where, c=color, marker=marker, s=60, label=state, transform=axes.get_xaxis_transform()
            )
    if is_wide([value for _, value in done]):
        axes.set_yscale("log")
        log_axis(axes.yaxis)
    axes.set_xlim(-0.5, len(record.trials) - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("Trial")
    axes.set_ylabel(title_of(metric))
    axes.set_title(f"{title_of(metric)} by trial ({better(metric)})")
    axes.legend()
    return figure


def draw_parallel_coordinates(record: SweepRecord) -> Figure | None:
    """A line for each trial through its settings and metrics, coloured by the first objective; grey without it."""
    from matplotlib import colormaps

    metric = next(iter(record.objectives))
    trials = [trial for trial in record.trials if trial.params]
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    metrics = [name for name in (*record.objectives, *record.record) if any(name in t.metrics for t in trials)]
    if not keys or not metrics:
        return None
    columns = [Column(key, [trial.params.get(key) for trial in trials]) for key in keys]
    columns += [
        Column(title_of(name), [in_unit(name, trial.metrics.get(name)) for trial in trials]) for name in metrics
    ]
    color_of = columns[len(keys) + metrics.index(metric)] if metric in metrics else None
    figure, axes = _figure(4.4)
    colors = colormaps["cividis"]
    # the best lie on top
    order = sorted(range(len(trials)), key=lambda i: -(trials[i].metrics.get(metric) or math.inf))
    for i in order:
        heights = [(x, y) for x, column in enumerate(columns) if (y := column.heights[i]) is not None]
        share = color_of.heights[i] if color_of else None
        style = {"color": LIGHT, "linestyle": "--"} if share is None else {"color": colors(share)}
        axes.plot(*zip(*heights, strict=True), linewidth=1.6, **style)
    for x, column in enumerate(columns):
        axes.axvline(x, color=GREY, linewidth=0.8, zorder=0)
        for height, label in column.ticks:
            axes.annotate(label, (x, height), (4, 0), textcoords="offset points", fontsize=8, va="center", bbox=PLATE)
    axes.set_xticks(range(len(columns)), [column.title for column in columns], rotation=15, ha="right", fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 1 + 0.6)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"Trials, coloured by {title_of(metric)} (dark is low, dashed did not complete)")
    return figure


class Column:
    """One vertical axis: the height in [0, 1] of each trial's value (None where it has none), and labels on it."""

    def __init__(self, title: str, values: Sequence[Any]):
        self.title = title
        given = [value for value in values if value is not None]
        place = _place_numbers(given) if given and all(map(is_number, given)) else _place_words(given)
        self.heights = [None if value is None else place(value)[0] for value in values]
        self.ticks = [place(value) for value in _labelled(given)]


def _labelled(given: list[Any]) -> list[Any]:
    """What is written on an axis: every word; of numbers the ends and the middle between them."""
    if not given or not all(map(is_number, given)):
        return sorted({str(value) for value in given})
    low, high = min(given), max(given)
    return [low, math.sqrt(low * high) if is_wide(given) else (low + high) / 2, high] if high > low else [low]


def _place_numbers(given: list[float]) -> Callable[[Any], tuple[float, str]]:
    low, high = min(given), max(given)
    scale = math.log if is_wide(given) else float

    def place(value: float) -> tuple[float, str]:
        height = (scale(value) - scale(low)) / (scale(high) - scale(low)) if high > low else 0.5
        return height, f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    return place


def _place_words(given: list[Any]) -> Callable[[Any], tuple[float, str]]:
    words = sorted({str(value) for value in given})

    def place(value: Any) -> tuple[float, str]:
        height = words.index(str(value)) / (len(words) - 1) if len(words) > 1 else 0.5
        return height, str(value)

    return place


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows them all."""
    return min(values) > 0 and max(values) / min(values) > LOG_ABOVE


def better(metric: str) -> str:
    """Which way is better, in words."""
    return "lower is better" if METRICS[metric][1] == "minimize" else "higher is better"


def _figure(height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()
