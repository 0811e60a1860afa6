"""The figures of a run as PNG files in `<run>/figures`, drawn from the files of its folder only.

One style, colours that colour-blind readers can tell apart (Okabe and Ito), units on every axis. A figure whose data
are missing is not drawn. matplotlib is imported inside the functions, and only its file backend (Agg): no window.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.report.record import RunRecord, block_and_kind, is_number, read_run
from qat.report.table import megabytes, perplexity_text, result_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
GREY, LIGHT = "#767676", "#e4e4e4"
FAMILY = {"float": GREY, "control": GREY, "rtn": ORANGE, "rtn_of_control": ORANGE, "fake_quant": BLUE, "packed": BLUE}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.8,
    "xtick.color": "#404040",
    "ytick.color": "#404040",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.dpi": 130,
    "figure.facecolor": "white",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
}
WIDTH = 8.6
# Above this many layers single bars are too thin to read and a heat map takes over.
MAX_BARS = 24
# Loss lines with more points than this also get a running mean.
SMOOTH_ABOVE = 60


def write_figures(run: Path) -> dict[str, Path]:
    """Draw every figure the files of `run` allow into `run/figures`; returns name -> path in the order of the page."""
    import matplotlib

    record, paths = read_run(run), {}
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(record)
            if figure is None:
                continue
            path = run / "figures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            beside = path.with_suffix(".tmp")
            figure.savefig(beside, format="png")
            os.replace(beside, path)
            paths[name] = path
    return paths


def draw_perplexity(record: RunRecord) -> Figure | None:
    """A bar per row of the result table; dots on a logarithmic axis when the rows are too far apart for bars."""
    rows = [row for row in result_rows(record.results or {}) if is_number(row.perplexity)]
    if not rows:
        return None
    figure, axes = _figure(0.42 * len(rows) + 1.3)
    values = [float(row.perplexity or 0) for row in rows]
    places = range(len(rows))
    colors = [FAMILY.get(row.key, PURPLE) for row in rows]
    far_apart = min(values) > 0 and max(values) / min(values) > 8
    if far_apart:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.5, max(values) * 3)
        log_axis(axes.xaxis)
        axes.scatter(values, places, s=90, c=colors, zorder=3)
    else:
        axes.barh(places, values, color=colors, height=0.68)
        axes.set_xlim(0, max(values) * 1.12)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            perplexity_text(value), (value, place), (9 if far_apart else 5, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(places, [row.label for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"Perplexity on held-out text (lower is better{', log axis' if far_apart else ''})")
    axes.set_title("Perplexity")
    return figure


def draw_loss(record: RunRecord) -> Figure | None:
    """The loss with its running mean, the start of every phase, and the learning rate below."""
    steps, losses = record.series("train", "loss")
    if not steps:
        return None
    figure, (axes, below) = _figure(4.6, rows=2, heights=[3, 1])
    many = len(losses) > SMOOTH_ABOVE
    axes.plot(steps, losses, color=BLUE, alpha=0.3 if many else 1, linewidth=1 if many else 1.8, label="loss")
    if many:
        axes.plot(steps, _running_mean(losses, len(losses) // 60 + 1), color=BLUE, label="loss, running mean")
    parts = {key: record.series("train", key) for key in ("kl", "ce")}
    if all(values for _, values in parts.values()):
        for (key, (at, values)), color, dash in zip(parts.items(), (GREEN, PURPLE), ("--", ":"), strict=True):
            axes.plot(at, values, dash, color=color, linewidth=1.2, label={"kl": "KL to teacher", "ce": "CE"}[key])
    if min(losses) > 0 and max(losses) / min(losses) > 10:
        axes.set_yscale("log")
        log_axis(axes.yaxis)
    _mark_phases(axes, record)
    axes.set_ylabel("Loss (nats per token)")
    axes.set_title("Training loss")
    if len(axes.get_lines()) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")
    below.plot(*record.series("train", "lr"), color=ORANGE)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.set_ylim(bottom=0)
    below.set_ylabel("Learning rate")
    _step_axis(below)
    return figure


def draw_validation(record: RunRecord) -> Figure | None:
    """Validation perplexity over steps."""
    steps, values = record.series("validation", "perplexity")
    if not steps:
        return None
    figure, axes = _figure(3.2)
    axes.plot(steps, values, "o-", color=BLUE, markersize=5)
    best = min(range(len(values)), key=values.__getitem__)
    for place in {0, best, len(values) - 1}:
        axes.annotate(
            perplexity_text(values[place]), (steps[place], values[place]), (0, 8), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
    axes.margins(y=0.18)
    axes.set_ylabel("Perplexity")
    axes.set_title("Validation perplexity, fake-quantized model")
    _step_axis(axes)
    return figure


def draw_sqnr(record: RunRecord) -> Figure | None:
    """SQNR of every layer at the last measurement: bars, or a heat map of block x kind above `MAX_BARS` layers."""
    lines = record.metrics.get("layers") or [{}]
    layers = {n: s["sqnr_db"] for n, s in (lines[-1].get("layers") or {}).items() if is_number(s.get("sqnr_db"))}
    if not layers:
        return None
    title = f"Weight signal to quantization noise by layer, step {lines[-1]['step']}"
    return _heat_map(layers, title) if len(layers) > MAX_BARS else _bars(layers, title)


def draw_layer_health(record: RunRecord) -> Figure | None:
    """Clip share, code flips and scale drift over steps: the median over layers and the band from 10 to 90 %."""
    lines = record.metrics.get("layers") or []
    panels = {"clip_share": ("Clipped values (%)", 100, RED), "flip_rate": ("Flipped codes (%)", 100, BLUE)}
    panels["scale_drift"] = ("Scale drift", 1, GREEN)
    bands = {key: _bands(lines, key, factor) for key, (_, factor, _) in panels.items()}
    bands = {key: band for key, band in bands.items() if band}
    if not bands:
        return None
    figure, panes = _figure(1.55 * len(bands) + 0.9, rows=len(bands))
    panes = panes if len(bands) > 1 else [panes]
    for pane, (key, band) in zip(panes, bands.items(), strict=True):
        label, _, color = panels[key]
        steps, low, middle, high = zip(*band, strict=True)
        pane.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        pane.plot(steps, middle, color=color, marker="o", markersize=3)
        pane.set_ylim(bottom=min(0.0, *low), top=None if max(high) > 0 else 1)
        pane.set_ylabel(label)
    panes[0].set_title("Layer health: median over layers, band from 10 to 90 %")
    _step_axis(panes[-1])
    return figure


def draw_bytes(record: RunRecord) -> Figure | None:
    """Where the bytes are: one stacked bar for the float model, one for the packed, split by kind and scheme."""
    coverage = record.coverage or {}
    layers = [layer for layer in coverage.get("layers") or [] if is_number(layer.get("bytes"))]
    weights = sum(layer.get("weights") or 0 for layer in layers)
    if not weights:
        return None
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in layers:
        group = groups[f"{layer.get('kind')}, {layer.get('scheme') or 'float'}"]
        group[0] += (coverage.get("float_bytes") or 0) * (layer.get("weights") or 0) / weights
        group[1] += layer["bytes"]
    figure, axes = _figure(2.3)
    left = [0.0, 0.0]
    colors = [BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY, "#000000"]
    ordered = sorted(groups.items(), key=lambda item: -item[1][1])
    for place, (name, sizes) in enumerate(ordered):
        label = f"{name}: {megabytes(sizes[1])} MB packed"
        color = colors[min(place, len(colors) - 1)]
        axes.barh(
            [0, 1], [size / 1e6 for size in sizes], left=left, color=color, height=0.6, edgecolor="white", label=label
        )
        left = [start + size / 1e6 for start, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(megabytes(total * 1e6), (total, place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks([0, 1], ["Float", "Packed"])
    axes.set_xlim(0, max(left) * 1.1)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Size (MB)")
    axes.set_title("Where the bytes are")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.32), ncols=2, fontsize=9)
    return figure


def draw_sensitivity(record: RunRecord) -> Figure | None:
    """A panel per candidate scheme, kinds of layers by blocks, coloured by KL on a log scale; dots are the choice."""
    import numpy as np
    from matplotlib.colors import LogNorm

    content = record.sensitivity or {}
    # a unit of several layers fills the cells of all of them
    named = [(unit, *block_and_kind(name)) for unit in content.get("layers") or [] for name in unit.get("names", [])]
    cells = [(unit, block, kind) for unit, block, kind in named if block is not None]
    names = content.get("candidates") or []
    kinds = list(dict.fromkeys(kind for _, _, kind in cells))
    blocks = sorted({block for _, block, _ in cells})
    values = np.full((len(names), len(kinds), len(blocks)), np.nan)
    for unit, block, kind in cells:
        for place, name in enumerate(names):
            kl: Any = (unit.get("kl") or {}).get(name)
            if is_number(kl):
                values[place, kinds.index(kind), blocks.index(block)] = max(float(kl), 1e-9)
    if not np.isfinite(values).any():
        return None
    figure, panels = _figure((0.2 * len(kinds) + 0.5) * len(names) + 0.6, rows=len(names))
    panels = np.atleast_1d(panels)
    scale = LogNorm(np.nanmin(values), np.nanmax(values))
    for panel, name, grid in zip(panels, names, values, strict=True):
        panel.grid(visible=False)
        panel.set_facecolor(LIGHT)
        image = panel.imshow(grid, cmap="cividis", aspect="auto", norm=scale)
        chosen = [(blocks.index(b), kinds.index(k)) for unit, b, k in cells if unit.get("chosen") == name]
        if chosen:
            panel.scatter(*zip(*chosen, strict=True), s=14, c="white", edgecolors="black", linewidths=0.6)
        panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
        panel.set_ylabel(name, fontsize=9)
    panels[-1].set_xticks(range(0, len(blocks), len(blocks) // 32 + 1), blocks[:: len(blocks) // 32 + 1], fontsize=8)
    panels[-1].set_xlabel("Block (a dot: what the plan chose)")
    panels[0].set_title("Sensitivity of single layers")
    figure.colorbar(image, ax=list(panels), pad=0.01, label="KL to the float model (nats per token)")
    return figure


FIGURES: dict[str, Callable[[RunRecord], Figure | None]] = {
    "perplexity": draw_perplexity,
    "loss": draw_loss,
    "validation": draw_validation,
    "sqnr": draw_sqnr,
    "layer_health": draw_layer_health,
    "bytes": draw_bytes,
    "sensitivity": draw_sensitivity,
}


def _figure(height: float, rows: int = 1, heights: list[int] | None = None) -> tuple[Figure, Any]:
    # Figure without pyplot: no global state, and saving a PNG picks Agg by itself
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, height_ratios=heights)


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("Optimizer step")


def log_axis(axis: Axis) -> None:
    """Plain numbers instead of powers of ten: at 1, 2 and 5, or at 1 only when there are many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of up to `width` neighbours on either side: it neither lags nor bends at the ends."""
    last = len(values) - 1
    halves = [min(width, place, last - place) for place in range(len(values))]
    windows = [values[place - half : place + half + 1] for place, half in enumerate(halves)]
    return [sum(window) / len(window) for window in windows]


def _mark_phases(axes: Axes, record: RunRecord) -> None:
    """A dashed line and the name at the first step of each phase, from the phase lines or else the training lines."""
    marks: list[tuple[int, str]] = []
    for line in record.metrics.get("phase") or record.metrics.get("train", []):
        if line.get("phase") and (not marks or marks[-1][1] != line["phase"]):
            marks.append((line["step"], line["phase"]))
    first, last = axes.get_xlim()
    for place, (step, name) in enumerate(marks):
        axes.axvline(step, color=GREY, linestyle="--", linewidth=1)
        if place + 1 < len(marks) and marks[place + 1][0] - step < 0.03 * (last - first):
            # two names would cover each other: the next mark carries both
            marks[place + 1] = (marks[place + 1][0], f"{name}, {marks[place + 1][1]}")
            continue
        # at the bottom, because a falling curve leaves room there where most phases begin
        axes.annotate(
            name, (step, 0.03), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            rotation=90, va="bottom", fontsize=8, color="#404040",
        )  # fmt: skip


def _bands(lines: list[dict[str, Any]], key: str, factor: float) -> list[tuple[int, float, float, float]]:
    """(step, 10 %, median, 90 %) over the layers of each line that has `key`."""
    import numpy as np

    bands = []
    for line in lines:
        values = [factor * s[key] for s in (line.get("layers") or {}).values() if is_number(s.get(key))]
        if values:
            low, middle, high = np.percentile(values, [10, 50, 90]).tolist()
            bands.append((line["step"], low, middle, high))
    return bands


def _bars(layers: dict[str, float], title: str) -> Figure:
    figure, axes = _figure(0.24 * len(layers) + 1.2)
    axes.barh(range(len(layers)), list(layers.values()), color=BLUE, height=0.7)
    axes.set_yticks(range(len(layers)), list(layers), fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("SQNR (dB, higher is better)")
    axes.set_title(title)
    return figure


def _heat_map(layers: dict[str, float], title: str) -> Figure:
    """Rows are module kinds, columns blocks; a cell with several layers (experts) shows the worst."""
    import numpy as np

    cells: dict[tuple[str, int | None], float] = {}
    for name, value in layers.items():
        block, kind = block_and_kind(name)
        cells[kind, block] = min(value, cells.get((kind, block), value))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells}, key=lambda b: (b is None, b))
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for (kind, block), value in cells.items():
        grid[kinds.index(kind), blocks.index(block)] = value
    figure, axes = _figure(0.34 * len(kinds) + 1.7)
    axes.grid(visible=False)
    axes.set_facecolor(LIGHT)
    image = axes.imshow(grid, cmap="cividis", aspect="auto")
    if len(blocks) <= 32:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                color = "black" if value > middle else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    every = len(blocks) // 32 + 1
    shown = range(0, len(blocks), every)
    axes.set_xticks(shown, ["none" if blocks[i] is None else str(blocks[i]) for i in shown], fontsize=8)
    axes.set_xlabel("Block (grey: no such layer)")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, pad=0.01, label="SQNR (dB)")
    return figure
