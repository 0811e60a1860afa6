"""RunRecord: everything a run folder says, read once. Files only; no model, no torch, no plotting.

A file that is missing is None; one that cannot be read is None too and is named in `unreadable`. In metrics.jsonl a
line whose step is not past the one before it comes from a resumed run and replaces what it repeats.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class RunRecord:
    """`metrics` maps event (train, validation, layers, phase) to its lines in rising order of step."""

    path: Path
    config: str | None = None
    manifest: dict[str, Any] | None = None
    status: dict[str, Any] | None = None
    coverage: dict[str, Any] | None = None
    results: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    sensitivity: dict[str, Any] | None = None
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def series(self, event: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key, without the lines where it is null or not a number."""
        lines = [line for line in self.metrics.get(event, []) if is_number(line.get(key))]
        return [line["step"] for line in lines], [float(line[key]) for line in lines]


def is_number(value: object) -> bool:
    """True of a finite int or float (booleans are no numbers here)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(run: Path) -> RunRecord:
    """Read whatever files the folder has. Never raises for a missing or broken file."""
    record = RunRecord(run)
    record.manifest = _read_object(record, "manifest.json")
    record.status = _read_object(record, "run_status.json")
    record.coverage = _read_object(record, "coverage.json")
    record.results = _read_object(record, "results.json")
    record.parity = _read_object(record, "parity.json")
    record.sensitivity = _read_object(record, "sensitivity.json")
    record.config = _read_text(record, "resolved.yaml")
    for number, text in enumerate((_read_text(record, "metrics.jsonl") or "").splitlines(), start=1):
        line = _parse_object(text)
        if line is None or not isinstance(line.get("step"), int):
            record.unreadable.append(f"metrics.jsonl line {number}")
            continue
        lines = record.metrics.setdefault(str(line.get("event")), [])
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return record


def block_and_kind(name: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.down_proj` -> (3, `mlp.down_proj`); further numbers (experts) become `*`."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return int(part), re.sub(r"\b\d+\b", "*", ".".join(parts[place + 1 :])) or "block"
    return None, parts[-1]


def _read_text(record: RunRecord, name: str) -> str | None:
    path = record.path / name
    if not path.is_file():
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_object(record: RunRecord, name: str) -> dict[str, Any] | None:
    text = _read_text(record, name)
    if text is None:
        return None
    value = _parse_object(text)
    if value is None:
        record.unreadable.append(name)
    return value
