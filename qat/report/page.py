"""report.html of a run: one file that opens anywhere, offline, in light or dark, without a script.

Made from the files of the run folder only. Everything read from a file is escaped. Warnings come before any number; a
section whose file is missing says "not run". How numbers are written is in `table.py`, the pictures in `figures.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from qat.report.diagnosis import diagnosis
from qat.report.figures import write_figures
from qat.report.html import NOT_RUN, write_page
from qat.report.html import details as _details
from qat.report.html import image as _image
from qat.report.html import table as _table
from qat.report.record import RunRecord, is_number, read_run
from qat.report.table import (
    HEADER,
    MISSING,
    cells,
    megabytes,
    number_text,
    parity_text,
    perplexity_text,
    recovery_text,
    result_rows,
    warnings,
)


def write_report(run: Path) -> Path:
    """Write `run/report.html` (and `run/figures`) from whatever files the folder has; returns its path."""
    record = read_run(run)
    figures = {name: _image(name, path) for name, path in write_figures(run).items()}
    sections = (
        ("Verdict", _verdict(record)),
        ("Results", _results(record)),
        ("Perplexity", figures.get("perplexity", NOT_RUN)),
        ("Loss", figures.get("loss", NOT_RUN)),
        ("Validation", figures.get("validation", NOT_RUN)),
        ("Layer health", "".join(figures[n] for n in ("sqnr", "layer_health") if n in figures) or NOT_RUN),
        ("Sensitivity", figures.get("sensitivity", NOT_RUN)),
        ("Coverage", _coverage(record, figures.get("bytes", ""))),
        ("Parity", _parity(record)),
        ("Answers of the packed model", _answers(record)),
        ("Configuration", NOT_RUN if record.config is None else f"<pre>{escape(record.config)}</pre>"),
        ("Manifest", _manifest(record)),
    )
    return write_page(run / "report.html", f"QAT run {run.resolve().name}", sections, _warnings(record))


def _warnings(record: RunRecord) -> str:
    lines = [*warnings(record.results, record.parity, record.status), *diagnosis(record)]
    if record.unreadable:
        shown, more = ", ".join(record.unreadable[:5]), len(record.unreadable) - 5
        lines.append(f"Could not be read and is left out: {shown}{f' and {more} more' if more > 0 else ''}.")
    return "".join(f'<div class="warning" role="alert">Warning: {escape(line)}</div>\n' for line in lines)


def _verdict(record: RunRecord) -> str:
    lines = [f"<b>Recovery:</b> {escape(recovery_text(record.results))}"]
    lines.append(f"<b>Parity of training and file:</b> {escape(parity_text(record.parity))}")
    if record.results is not None:
        rows = {row.key: row for row in result_rows(record.results)}
        small, large = rows["packed"], rows["float"]
        bits = number_text(small.bits_per_weight, ".2f")
        size = f"{megabytes(small.bytes)} MB at {bits} bits per weight, float {megabytes(large.bytes)} MB"
        lines.append(f"<b>Size:</b> {escape(size)}.")
        both = f"packed {perplexity_text(small.perplexity)}, float {perplexity_text(large.perplexity)}"
        lines.append(f"<b>Perplexity:</b> {escape(both)}.")
    status = record.status or {}
    state = f"{status.get('status', 'not run')}, step {status.get('step', MISSING)}"
    lines.append(f"<b>Run:</b> {escape(state)}.")
    return "".join(f"<p>{line}</p>\n" for line in lines)


def _results(record: RunRecord) -> str:
    results = record.results
    if results is None:
        return NOT_RUN
    rows = result_rows(results)
    table = _table(HEADER, [cells(row) for row in rows], [row.key == "packed" for row in rows])
    seconds, tokens = results.get("seconds") or {}, results.get("tokens") or {}
    facts = {
        "Protocol": results.get("protocol"),
        "Seed": results.get("seed"),
        "Tokens": ", ".join(f"{name} {count:,}" for name, count in tokens.items() if is_number(count)),
        "Seconds": ", ".join(
            f"{name} {number_text(value, ',.2f')}" for name, value in seconds.items() if is_number(value)
        ),
    }
    lines = [f"{name}: {value}" for name, value in facts.items() if value not in (None, "")]
    lines += [f"Note: {note}" for note in results.get("notes") or []]
    return table + "".join(f'<p class="quiet">{escape(line)}</p>\n' for line in lines)


def _coverage(record: RunRecord, figure: str) -> str:
    coverage = record.coverage
    if coverage is None:
        return NOT_RUN
    layers = coverage.get("layers") or []
    share, bits = coverage.get("coverage"), number_text(coverage.get("bits_per_weight"), ".2f")
    percent = MISSING if share is None else f"{100 * share:.1f} %"
    head = f"<p>{percent} of {coverage.get('weights') or 0:,} weights are quantized; {bits} bits per weight.</p>\n"
    skipped = [layer for layer in layers if layer.get("scheme") is None]
    left_float = [(_name(la), la.get("kind"), _whole(la.get("weights")), la.get("reason")) for la in skipped]
    head += f"<h3>Left in float: {len(skipped)}</h3>\n"
    if skipped:
        head += _table(("Layer", "Kind", "Weights", "Reason"), left_float)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for layer in layers:
        key = (str(layer.get("kind")), layer.get("scheme") or "float", number_text(layer.get("bits"), ".2f"))
        groups.setdefault(key, []).append(layer)
    counts = [
        (*key, len(group), _whole(_sum(group, "weights")), megabytes(_sum(group, "bytes")))
        for key, group in groups.items()
    ]
    grouped = _table(("Kind", "Scheme", "Bits", "Layers", "Weights", "MB"), counts)
    every = [
        (_name(la), la.get("kind"), _shape(la), la.get("scheme") or "float", number_text(la.get("bits"), ".2f"),
         _whole(la.get("weights")), megabytes(la.get("bytes")), la.get("reason"))
        for la in layers
    ]  # fmt: skip
    full = _table(("Layer", "Kind", "Shape", "Scheme", "Bits", "Weights", "MB", "Reason"), every)
    return f"{head}<h3>By kind</h3>\n{grouped}{figure}{_details(f'All {len(layers)} layers', full)}"


def _parity(record: RunRecord) -> str:
    parity = record.parity
    if parity is None:
        return NOT_RUN
    logits, perplexity = parity.get("logits") or {}, parity.get("perplexity") or {}
    facts = [
        ("Largest difference of logits", number_text(logits.get("max_abs_difference"), ".3g")),
        ("Mean KL (nats per token)", number_text(logits.get("mean_kl"), ".3g")),
        ("Same most likely token", number_text(logits.get("top1_agreement"), ".3%")),
        ("Perplexity, fake-quantized", number_text(perplexity.get("fake_quant"), ".4f")),
        ("Perplexity, packed", number_text(perplexity.get("packed"), ".4f")),
        ("Relative difference of perplexity", number_text(perplexity.get("relative_difference"), ".3g")),
    ]
    yes = {True: "equal", False: "DIFFERENT"}
    tensors = [
        (_name(t), _shape(t), t.get("bits"), _whole(t.get("codes")), _whole(t.get("mismatched_codes")),
         yes.get(t.get("scales_equal")), yes.get(t.get("zero_points_equal")))
        for t in parity.get("tensors") or []
    ]  # fmt: skip
    header = ("Tensor", "Shape", "Bits", "Codes", "Different codes", "Scales", "Zero points")
    whole = _details(f"All {len(tensors)} tensors", _table(header, tensors))
    return f"<p>{escape(parity_text(parity))}</p>\n{_table(('Measure', 'Value'), facts)}{whole}"


def _answers(record: RunRecord) -> str:
    answers = (record.results or {}).get("answers") or []
    blocks = (
        f"<p><b>{escape(str(answer.get('prompt')))}</b></p>\n<pre>{escape(str(answer.get('answer')))}</pre>\n"
        for answer in answers
    )
    return "".join(blocks) or NOT_RUN


def _manifest(record: RunRecord) -> str:
    if record.manifest is None:
        return NOT_RUN
    return _table(("Key", "Value"), list(_flat(record.manifest)))


def _flat(values: dict[str, Any], before: str = "") -> Iterable[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _name(entry: dict[str, Any]) -> str:
    return str(entry.get("name"))


def _shape(entry: dict[str, Any]) -> str:
    return " × ".join(map(str, entry.get("shape") or [])) or MISSING


def _whole(count: float | None) -> str:
    return number_text(count, ",.0f")


def _sum(entries: Iterable[dict[str, Any]], key: str) -> float:
    return sum(entry.get(key) or 0 for entry in entries)
