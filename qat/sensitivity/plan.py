"""What a measurement leaves: sensitivity.json, and the plan that was chosen, as an ordinary YAML of the plan group."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from qat.scheme import QuantScheme
from qat.sensitivity.measure import Unit


def result(
    facts: dict[str, Any],
    found: list[Unit],
    schemes: list[QuantScheme],
    measured: dict[tuple[tuple[str, ...], str], float],
    chosen: list[str] | None,
) -> dict[str, Any]:
    """The content of sensitivity.json: KL (nats per token) and bytes of every unit and candidate, and the choice."""
    layers = [
        {
            "names": list(unit.names),
            "block": unit.block,
            "weights": unit.weights,
            "bytes": {scheme.name: unit.bytes(scheme) for scheme in schemes},
            "kl": {scheme.name: measured[unit.names, scheme.name] for scheme in schemes},
            "chosen": chosen[place] if chosen else None,
        }
        for place, unit in enumerate(found)
    ]
    return {"measured": facts, "candidates": [scheme.name for scheme in schemes], "layers": layers}


def totals(content: dict[str, Any], chosen: list[str]) -> dict[str, float]:
    """Bits per weight of the measured layers and the sum of their single KL, for one scheme name per unit."""
    picked = list(zip(content["layers"], chosen, strict=True))
    size, weights = sum(unit["bytes"][name] for unit, name in picked), sum(unit["weights"] for unit, _ in picked)
    return {"bits_per_weight": 8 * size / weights, "kl_sum": sum(unit["kl"][name] for unit, name in picked)}


def rules(found: list[Unit], chosen: list[str], stack: str, own: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(glob, scheme) in order: `own`, every layer that differs from the most common choice, and that for the rest.

    `stack` is the name of the list of decoder blocks.
    """
    common = Counter(name for unit, name in zip(found, chosen, strict=True) for _ in unit.sites).most_common(1)[0][0]
    picked = [(layer, name) for unit, name in zip(found, chosen, strict=True) if name != common for layer in unit.names]
    return [*own, *picked, (f"{stack}.*", common)]


def plan_yaml(title: str, chosen: list[tuple[str, str]], embedding: str, sensitivity: str | None) -> str:
    """A file of the plan group; `title` becomes its description, `sensitivity` the file that the report draws."""
    lines = [f"  - {{match: {json.dumps(match)}, scheme: {scheme}}}" for match, scheme in chosen]
    told = [] if sensitivity is None else [f"sensitivity: {json.dumps(sensitivity)}"]
    return "\n".join([f"# {title}", f"embedding: {embedding}", *told, "rules:", *lines, ""])
