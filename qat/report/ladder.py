"""The tables of the ladder in Markdown, from docs/results/ladder.json that scripts/ladder.py writes.

For each setting one table on held-out text of the training kind, with what the issue of a rung is and whether it is
reached, and one with the other texts. Perplexities are of the control where a baseline is named (the float model itself
when nothing but distillation is trained); recovery = 1 - ln(packed / control) / ln(baseline / control).
"""

from __future__ import annotations

import math
from typing import Any

from qat.report.table import MISSING, markdown, number_text, perplexity_text

OWN = "own"
BASELINES = {"rtn": "RTN", "rtn_mse": "RTN+MSE", "gptq": "GPTQ", "awq": "AWQ", "squeezellm": "SqueezeLLM"}
SETTINGS = {
    "recover": "Recover: KL to the own float model; the control is the float model",
    "adapt": "Adapt: cross entropy on the text; the control is the float model fine-tuned on the same tokens",
}
LEAST_GAP = 1e-3  # of ln perplexity; a smaller loss by rounding leaves nothing to recover but noise
# rung -> what the packed model must reach on text of the training kind: recovery, or a multiple of the control
LEAST_RECOVERY = {"w4a16_g32": 0.75, "w4a16_g64": 0.75, "w4a16_row": 0.85, "w3a16_g64": 0.90}
MOST_OF_CONTROL = {"w8a8": 1.003, "w2a16_g32": 2.5, "kv8": 1.001, "kv4": 1.025}
# rung -> another whose packed perplexity, times the number, it must not exceed
MOST_OF_RUNG = {"w4a8_g32": ("w4a16_g32", 1.01), "mixed_3_5_bits": ("w4a16_row", 1.0)}


def recovered(packed: float, control: float, baseline: float | None) -> float | None:
    """The share of the loss between control and baseline that `packed` does not have; None without such a loss."""
    if baseline is None or not all(map(math.isfinite, (packed, control, baseline))):
        return None
    gap = math.log(baseline / control)
    return None if gap <= LEAST_GAP else 1 - math.log(packed / control) / gap


def perplexity_of(row: dict[str, Any], model: str, text: str = OWN) -> float | None:
    """Of one model of a rung on one text; None where it was not measured. The control may be the float model."""
    name = "float" if model == "control" and row["control_is_float"] else model
    return row["models"].get(name, {}).get("texts", {}).get(text, {}).get("perplexity")


def best_baseline(row: dict[str, Any], text: str = OWN) -> tuple[str, float] | None:
    """Name and perplexity of the best post-training method."""
    found = [(value, name) for name in BASELINES if (value := perplexity_of(row, name, text)) is not None]
    return (min(found)[1], min(found)[0]) if found else None


def goal(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, bool | None]:
    """What the rung must reach, and whether it does; None where the numbers for that are not there."""
    rung, packed, control = row["rung"], perplexity_of(row, "packed"), perplexity_of(row, "control")
    if rung in LEAST_RECOVERY:
        least, rtn = LEAST_RECOVERY[rung], perplexity_of(row, "rtn")
        share = recovered(packed, control, rtn) if packed and control else None
        return f"recovery ≥ {least:.0%}", None if share is None else share >= least
    if rung in MOST_OF_CONTROL:
        most = MOST_OF_CONTROL[rung]
        wanted = f"≤ {most:g} × control" if most >= 2 else f"≤ +{100 * (most - 1):.1f} %"
        return wanted, packed / control <= most if packed and control else None
    if rung in MOST_OF_RUNG:
        other, most = MOST_OF_RUNG[rung]
        same = [r for r in rows if (r["rung"], r["setting"], r["seed"]) == (other, row["setting"], row["seed"])]
        bound = perplexity_of(same[0], "packed") if same else None
        wanted = f"≤ {other}" + (f" + {100 * (most - 1):.0f} %" if most > 1 else "")
        return wanted, packed <= most * bound if packed and bound else None
    return MISSING, None


def problems_of(row: dict[str, Any]) -> list[str]:
    """Why the row is no success: training lost against its own baselines."""
    packed, best = perplexity_of(row, "packed"), best_baseline(row)
    if packed is None or best is None or packed <= best[1]:
        return []
    return [
        f"`{row['rung']}` ({row['setting']}, seed {row['seed']}): QAT {perplexity_text(packed)} is worse than "
        f"{BASELINES[best[0]]} {perplexity_text(best[1])}."
    ]


def ladder_table(ladder: dict[str, Any]) -> str:
    """All tables, with what fell short before them."""
    rows = list(ladder["rungs"].values())
    parts = []
    lost = [line for row in rows for line in problems_of(row)]
    missed = [
        f"`{r['rung']}` ({r['setting']}, seed {r['seed']}): {goal(r, rows)[0]} is missed."
        for r in rows
        if goal(r, rows)[1] is False
    ]
    if lost or missed:
        parts.append("".join(f"- {line}\n" for line in [*lost, *missed]))
    for setting, title in SETTINGS.items():
        chosen = [row for row in rows if row["setting"] == setting]
        if chosen:
            parts += [f"#### {title}\n", markdown(HEADER, [_cells(row, rows) for row in chosen])]
            parts += _costs(chosen)
            parts += _others(chosen, [text for text in ladder["texts"] if text != OWN])
    return "\n".join([*parts, f"{_protocol(ladder)}\n"])


HEADER = (
    *("Rung", "Seed", "Bits / weight", "Float", "Control", *BASELINES.values(), "QAT fake", "QAT packed"),
    *("Recovery", "of the best baseline", "KL to float", "Goal"),
)


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    packed, control, best = perplexity_of(row, "packed"), perplexity_of(row, "control"), best_baseline(row)
    shares = [
        recovered(packed, control, baseline) if packed and control else None
        for baseline in (perplexity_of(row, "rtn"), best and best[1])
    ]
    wanted, reached = goal(row, rows)
    mark = {None: "", True: " ✓", False: " ✗"}[reached]
    kl = row["models"].get("packed", {}).get("texts", {}).get(OWN, {}).get("kl")
    return [
        *(f"`{row['rung']}`", str(row["seed"]), number_text(row["bits_per_weight"], ".2f")),
        perplexity_text(perplexity_of(row, "float")),
        "= float" if row["control_is_float"] else perplexity_text(control),
        *(_baseline_cell(row, name) for name in BASELINES),
        *(perplexity_text(row["fake_quant"]), perplexity_text(packed)),
        *(number_text(share, ".0%") for share in shares),
        *(number_text(kl, ".4f"), f"{wanted}{mark}"),
    ]


def _baseline_cell(row: dict[str, Any], name: str) -> str:
    text, bits = perplexity_text(perplexity_of(row, name)), row["models"].get(name, {}).get("bits_per_weight")
    return text if bits is None else f"{text} ({bits:.2f} b)"


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    header = ("Rung", "Seed", "Training tokens", "Minutes", "of it steps", "Peak GiB", *(f"{n} s" for n in BASELINES))
    lines = [
        [
            *(f"`{row['rung']}`", str(row["seed"]), f"{row['tokens']:,}", number_text(row["minutes"], ".1f")),
            *(number_text(row[key], ".1f") for key in ("training_minutes", "peak_memory_gib")),
            *(number_text(row["models"].get(name, {}).get("seconds"), ".0f") for name in BASELINES),
        ]
        for row in rows
    ]
    return ["What it cost:\n", markdown(header, lines)]


def _others(rows: list[dict[str, Any]], texts: list[str]) -> list[str]:
    names = ("float", "control", *BASELINES, "packed")
    labels = ("Float", "Control", *BASELINES.values(), "QAT packed", "Recovery", "KL to float")
    lines = []
    for row in rows:
        for text in texts:
            values = [perplexity_of(row, name, text) for name in names]
            packed, control, rtn = values[-1], values[1], values[2]
            share = recovered(packed, control, rtn) if packed and control else None
            kl = row["models"].get("packed", {}).get("texts", {}).get(text, {}).get("kl")
            cells = [*map(perplexity_text, values), number_text(share, ".0%"), number_text(kl, ".4f")]
            lines.append([f"`{row['rung']}`", str(row["seed"]), text, *cells])
    return ["On text of other kinds:\n", markdown(("Rung", "Seed", "Text", *labels), lines)] if texts else []


def _protocol(ladder: dict[str, Any]) -> str:
    texts = "; ".join(
        f"{name} {text['tokens']:,} tokens, of whose runs of {text['overlap']['tokens']} tokens "
        f"{text['overlap']['share']:.2%} stand in the training text"
        for name, text in ladder["texts"].items()
    )
    note = (
        "SqueezeLLM, whose codes are not on a uniform grid, is measured on float weights with its values; its bits per "
        "weight stand beside it. It is for weights alone, of one width of at most 4 bits."
    )
    return f"{ladder['protocol']}. Texts: {texts}. {note}"
