"""Why training made a model worse than its own start, or than rounding: what the files of the run show.

Nothing is said of a run that ended better than both. The signs, each from a number that the run wrote:

    start          validation perplexity before the first step
    rate           the peak rate, and the share of codes that changed between two looks at the layers
    scales         how far they went from where they began
    over-fitting   validation that rose again while the loss fell
    text           passes over it, and held-out text that stands in it
    bf16           weights are float32 while they are trained, so updates are lost only when they are stored otherwise
"""

from __future__ import annotations

import re
from statistics import fmean

from qat.report.record import RunRecord, is_number
from qat.report.table import perplexity_text, result_rows

FEW_FLIPS, MANY_FLIPS = 1e-4, 0.05  # of the codes, between two looks
FAR_SCALES = 0.5  # relative
ROSE = 1.01
OVERLAP = 0.01


def diagnosis(record: RunRecord) -> list[str]:
    """Lines for the top of the report; none when nothing is wrong."""
    steps, values = record.series("validation", "perplexity")
    rows = {row.key: row.perplexity for row in result_rows(record.results or {})}
    packed, rtn = rows["packed"], rows["rtn_of_control"]
    found = []
    if steps and steps[0] == 0 and values[-1] > values[0]:
        start, end = perplexity_text(values[0]), perplexity_text(values[-1])
        found.append(f"Training made the model worse than it began: validation perplexity {start}, then {end}.")
    elif packed is None or rtn is None or packed <= rtn:
        return []
    return [*found, *signs(record)]


def signs(record: RunRecord) -> list[str]:
    """What may explain it, the likeliest first."""
    lines = [*_rate(record), *_scales(record), *_overfitting(record), *_text(record)]
    return lines or ["No sign of why: rate, flips, scales, validation and text look as they should."]


def _rate(record: RunRecord) -> list[str]:
    _, rates = record.series("train", "lr")
    flips = [value for value in _layers(record, "flip_rate")[1:] if value is not None]
    if not rates or not flips:
        return []
    rate, share = max(rates), fmean(flips)
    if share > MANY_FLIPS:
        return [
            f"Sign: {share:.1%} of the codes changed between two looks, at a peak rate of {rate:g}: lower optim.lr."
        ]
    if share < FEW_FLIPS:
        text = (
            f"Sign: only {share:.4%} of the codes changed between two looks, at a peak rate of {rate:g}: raise optim.lr"
        )
        lost = re.search(r"^  precision: bf16-true", record.config or "", re.MULTILINE)
        return [f"{text}, and keep float32 weights: bf16 ones lose small updates." if lost else f"{text}."]
    return []


def _scales(record: RunRecord) -> list[str]:
    drift = [value for value in _layers(record, "scale_drift") if value is not None]
    if drift and drift[-1] > FAR_SCALES:
        return [f"Sign: scales ended {drift[-1]:.0%} from where they began: lower optim.scale_lr."]
    return []


def _overfitting(record: RunRecord) -> list[str]:
    _, values = record.series("validation", "perplexity")
    _, losses = record.series("train", "loss")
    if len(values) < 3 or len(losses) < 8 or values[-1] <= ROSE * min(values) or values[0] == min(values):
        return []  # what never fell cannot have risen again
    quarter = len(losses) // 4
    if fmean(losses[-quarter:]) >= fmean(losses[:quarter]):
        return []
    best = perplexity_text(min(values))
    return [
        f"Sign: validation fell to {best} and rose to {perplexity_text(values[-1])} while the loss fell: more text."
    ]


def _text(record: RunRecord) -> list[str]:
    results = record.results or {}
    lines = [f"Sign: {note}." for note in results.get("notes") or [] if "was seen" in str(note)]
    share = (results.get("overlap") or {}).get("share") or 0.0
    if share > OVERLAP:
        lines.append(
            f"Sign: {share:.1%} of the held-out runs of tokens stand in the training text; numbers flatter it."
        )
    return lines


def _layers(record: RunRecord, key: str) -> list[float | None]:
    """The mean of a value over the layers, at each look; None where no layer has it."""
    means = []
    for line in record.metrics.get("layers", []):
        values = [layer[key] for layer in (line.get("layers") or {}).values() if is_number(layer.get(key))]
        means.append(fmean(values) if values else None)
    return means
