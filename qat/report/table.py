"""The result table of a run: for the terminal (rich), for Markdown, and the warnings that stand before it.

Six rows: float, control, RTN of each, QAT with fake quantization, QAT packed. The control is the float model trained
the same way without quantization; where nothing but self-distillation is trained it is the float model, and the row
says so. `recovery` is ln(PPL_rtn / PPL_qat) / ln(PPL_rtn / PPL_control), computed by the run, not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qat.report.record import is_number

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"
LABELS = {
    "float": "Float model",
    "control": "Float control (same training, not quantized)",
    "rtn": "RTN of the float model",
    "rtn_of_control": "RTN of the control",
    "fake_quant": "{method}, fake-quantized",
    "packed": "{method}, packed (as served)",
}
LABELS_CONTROL_IS_FLOAT = {
    "control": "Control: the float model itself",
    "rtn_of_control": "RTN of the control: RTN of the float model",
}


@dataclass(frozen=True)
class ResultRow:
    """One line of the table; a value that was not measured is None. `bytes` are those of the weights."""

    key: str
    label: str
    perplexity: float | None
    kl_to_float: float | None
    bits_per_weight: float | None
    bytes: int | None


def method_of(results: dict[str, Any]) -> str:
    """What made the model: QAT, or a post-training method such as GPTQ."""
    return str(results.get("method") or "qat").upper()


def result_rows(results: dict[str, Any]) -> list[ResultRow]:
    """The six rows, then any further ones of results["rows"] (their `name` is not one of the six keys)."""
    control_is_float = bool(results.get("control_is_float"))
    perplexity, kl = dict(results.get("perplexity") or {}), dict(results.get("kl_to_float") or {})
    if control_is_float:
        for values in (perplexity, kl):
            for key, same in (("control", "float"), ("rtn_of_control", "rtn")):
                values[key] = values.get(same) if values.get(key) is None else values[key]
    given = {row.get("name"): row for row in results.get("rows") or []}
    size = results.get("bytes") or {}
    rows = []
    for key, label in (LABELS | (LABELS_CONTROL_IS_FLOAT if control_is_float else {})).items():
        is_float = key in ("float", "control")
        bits = None if is_float else results.get("bits_per_weight")
        own = given.pop(key, {})
        rows.append(
            ResultRow(
                key=key,
                label=label.format(method=method_of(results)),
                perplexity=_first(perplexity.get(key), own.get("perplexity")),
                kl_to_float=kl.get(key),
                bits_per_weight=_first(own.get("bits_per_weight"), bits),
                bytes=_first(own.get("bytes"), size.get("float" if is_float else "packed")),
            )
        )
    for name, further in given.items():
        rest = (further.get("perplexity"), kl.get(name), further.get("bits_per_weight"), further.get("bytes"))
        rows.append(ResultRow(str(name), str(name), *rest))
    return rows


def warnings(results: dict[str, Any] | None, parity: dict[str, Any] | None, status: dict[str, Any] | None) -> list[str]:
    """What a reader must know before any number; None stands for a missing file."""
    found = []
    if status is None:
        found.append("It is not known whether the run finished: there is no readable run_status.json.")
    elif status.get("status") != "finished":
        found.append(
            f"The run did not finish: its status is '{status.get('status')}' at step {status.get('step', MISSING)}."
        )
    if parity is not None and not parity_is_equal(parity):
        found.append(f"The packed model is not the trained one. Parity is {parity_text(parity)}")
    rows = {row.key: row.perplexity for row in result_rows(results or {})}
    packed, rtn = rows["packed"], rows["rtn_of_control"]
    if packed is not None and not math.isfinite(packed):
        found.append("The perplexity of the packed model is not finite.")
    elif packed is not None and rtn is not None and packed > rtn:
        found.append(
            f"{method_of(results or {})} made the model worse: packed perplexity {perplexity_text(packed)}, "
            f"against {perplexity_text(rtn)} from rounding the control to nearest (RTN)."
        )
    return found


def parity_is_equal(parity: dict[str, Any]) -> bool:
    """The verdict, believed only when no tensor in the list contradicts it."""
    return parity.get("verdict") == "equal" and not _different(parity)


def parity_text(parity: dict[str, Any] | None) -> str:
    """One sentence: how many tensors and codes differ between training and file."""
    if parity is None:
        return "not run."
    different, tensors = _different(parity), parity.get("tensors") or []
    if parity_is_equal(parity):
        codes = sum(t.get("codes") or 0 for t in tensors)
        return f"equal: all {codes:,} codes of {len(tensors)} tensors are those of training."
    if not different:
        return f"different, by the run's verdict; none of the {len(tensors)} tensors is."
    codes = sum(t.get("mismatched_codes") or 0 for t in different)
    return f"different: {len(different)} of {len(tensors)} tensors (codes, scales or zero points), {codes:,} codes."


def recovery_text(results: dict[str, Any] | None) -> str:
    """One sentence: the share of the RTN loss gap that training closed."""
    if results is None:
        return "not run."
    if not is_number(results.get("recovery")):
        return "not defined (it needs a control, and an RTN of it that is worse)."
    against = "float model" if results.get("control_is_float") else "control"
    return f"{100 * results['recovery']:.1f} % of the loss gap between the {against} and its RTN is closed."


def render_table(results: dict[str, Any], parity: dict[str, Any] | None) -> Table:
    """The table for the terminal, with recovery, parity and any warning about them below it."""
    from rich.table import Table
    from rich.text import Text

    caption = Text()
    for warning in warnings(results, parity, {"status": "finished"}):
        caption.append(f"WARNING: {warning}\n", style="bold red")
    caption.append(f"Recovery: {recovery_text(results)}\nParity: {parity_text(parity)}")
    table = Table(caption=caption, caption_justify="left")
    for place, name in enumerate(HEADER):
        table.add_column(name, justify="right" if place else "left")
    for row in result_rows(results):
        table.add_row(*map(Text, cells(row)), style="bold" if row.key == "packed" else None)
    return table


HEADER = ("Model", "Perplexity", "KL to float", "Bits / weight", "MB")


def cells(row: ResultRow) -> tuple[str, ...]:
    """The texts of a row under `HEADER`."""
    kl, bits = number_text(row.kl_to_float, ".4f"), number_text(row.bits_per_weight, ".2f")
    return row.label, perplexity_text(row.perplexity), kl, bits, megabytes(row.bytes)


def markdown_table(results: dict[str, Any]) -> str:
    """The result table in Markdown, ending in a newline."""
    return markdown(HEADER, [cells(row) for row in result_rows(results)])


def summary_table(runs: Sequence[dict[str, Any]]) -> str:
    """One Markdown line per run; each is a results dict with `recipe` added."""
    lines = []
    for results in runs:
        rows = {row.key: row for row in result_rows(results)}
        names = ("float", "control", "rtn_of_control", "packed")
        values = [perplexity_text(rows[name].perplexity) for name in names]
        if results.get("control_is_float"):
            values[1] = "= float"
        share = results.get("recovery")
        recovery = f"{100 * share:.0f} %" if share is not None and is_number(share) else MISSING
        size = f"{megabytes(rows['float'].bytes)} → {megabytes(rows['packed'].bytes)}"
        bits = number_text(rows["packed"].bits_per_weight, ".2f")
        lines.append((f"`{results['recipe']}`", str(results.get("seed", MISSING)), bits, *values, recovery, size))
    header = ("Recipe", "Seed", "Bits / weight", "Float", "Control", "RTN of control", "QAT packed", "Recovery", "MB")
    return markdown(header, lines)


def bench_table(bench: dict[str, Any]) -> str:
    """The training step's cost in Markdown: seconds and GiB of peak memory, each also as a ratio to the plain step."""
    lines = []
    for row in bench["rows"]:
        low, high = row["spread"]
        seconds, ratio = number_text(row["median_seconds"], ".3f"), number_text(row["ratio_to_plain"], ".2f")
        memory, share = number_text(row["peak_memory_gib"], ".2f"), number_text(row["memory_ratio"], ".2f")
        lines.append((row["name"], str(row["threads"]), seconds, ratio, f"{low:.2f} – {high:.2f}", memory, share))
    header = ("Step", "Threads", "Median s", "× plain", "spread", "Peak GiB", "× plain")
    where = f"{bench['machine']}; torch {bench['torch']}; {bench['tokens']} tokens per step."
    return f"{markdown(header, lines)}\n{where}\n"


def decode_table(bench: dict[str, Any]) -> str:
    """Tokens per second of the contenders in Markdown, quiet and with a busy core, and who was absent."""

    def speed(row: dict[str, Any], key: str) -> str:
        if key not in row:
            return MISSING
        low, high = row[f"{key}_spread"]
        return f"{row[key]:.0f} ({low:.0f} – {high:.0f})"

    def lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
        return [
            (
                row["name"],
                str(row["threads"]),
                *(speed(row, key) for key in ("decode", "decode_1024", "prefill")),
                number_text(row["megabytes_per_token"], ".1f"),
                f"{row['share_of_bandwidth']:.0%}",
            )
            for row in rows
        ]

    header = ("Contender", "Threads", "Decode tok/s", "at 1024", "Prefill tok/s", "MB / token", "of read bandwidth")
    text = markdown(header, lines(bench["rows"]))
    if bench.get("busy_rows"):
        text += "\nWith another process keeping one core busy:\n\n" + markdown(header, lines(bench["busy_rows"]))
    return f"{text}\n{_bench_note(bench)}\n"


def ops_table(bench: dict[str, Any]) -> str:
    """Microseconds of one op on every contender in Markdown, with bandwidth for a single row."""
    lines = [
        (
            row["op"],
            row["name"],
            str(row["threads"]),
            str(row["m"]),
            number_text(row["microseconds"], ".1f"),
            f"{row['spread'][0]:.1f} – {row['spread'][1]:.1f}",
            number_text(row.get("gigabytes_per_second"), ".1f"),
            MISSING if row.get("share_of_bandwidth") is None else f"{row['share_of_bandwidth']:.0%}",
        )
        for row in bench["rows"]
    ]
    header = ("Op", "Contender", "Threads", "Rows", "Median µs", "spread", "GB/s", "of read bandwidth")
    return f"{markdown(header, lines)}\n{_bench_note(bench)}\n"


def kv_table(bench: dict[str, Any]) -> str:
    """Perplexity by the precision of the cache in Markdown, with the KL of the int8 cache's predictions."""
    of = bench["perplexity"]
    lines = [
        ("bf16", f"{of['bf16']:.3f}", MISSING, MISSING, MISSING),
        ("int8", f"{of['int8']:.3f}", f"{bench['relative']:+.2%}", f"{bench['kl']:.5f}", f"{bench['top1']:.1%}"),
    ]
    header = ("Cache", "Perplexity", "against bf16", "KL", "same first choice")
    where = (
        f"{bench['model']} {bench['scheme']}, {bench['tokens']:,} held-out tokens; the float model: {of['float']:.3f}."
    )
    return f"{markdown(header, lines)}\n{where}\n"


def overhead_table(bench: dict[str, Any]) -> str:
    """What checkpoints and signals add to the training step in Markdown: each alone, and in whole steps."""

    def line(what: str, seconds: float, share: float) -> tuple[str, ...]:
        return what, f"{1e3 * seconds:.3g}", f"{share:.3%}"

    size, every = megabytes(bench["save_bytes"]), bench["every"]
    lines = [
        line("asking for signals, every step", bench["poll_seconds"], bench["poll_share"]),
        line(f"a checkpoint of {size} MB, every {every} steps", bench["save_seconds"], bench["save_share"]),
        ("together", MISSING, f"{bench['share']:.3%}"),
    ]
    rows = {row["name"]: row for row in bench["rows"]}
    low, high = rows["polled"]["spread"]
    words = [
        f"Whole steps, {rows['bare']['median_seconds']:.3f} s: with signals asked for {rows['polled']['ratio']:.3f} ×",
        f"as long ({low:.3f} – {high:.3f}, the machine's noise included). run_status.json is written",
        f"at the start of each part of a run, {1e3 * bench['status_seconds']:.2g} ms.",
        f"{bench['scheme']}, {bench['tokens']} tokens a step,",
        f"{bench['threads']} threads; {bench['machine']['cpu']}, torch {bench['machine']['torch']}.",
    ]
    note = " ".join(words) + ("" if bench["quiet"] else " **Others used the machine during this run.**")
    return f"{markdown(('What', 'ms', 'of the step time'), lines)}\n{note}\n"


def _bench_note(bench: dict[str, Any]) -> str:
    machine = bench["machine"]
    peaks = ", ".join(f"{max(found.values()):.1f} GB/s with {n}" for n, found in bench["bandwidth"].items())
    text = f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}; read bandwidth {peaks} threads."
    text += "".join(f" Absent: {name} ({reason})." for name, reason in bench["absent"].items())
    return text if bench["quiet"] else f"{text} **Others used the machine during this run.**"


def perplexity_text(value: float | None) -> str:
    """Two decimals, none from 1000 on."""
    return number_text(value, ",.0f" if value is not None and value >= 1000 else ".2f")


def number_text(value: float | None, form: str) -> str:
    """`value` in the format `form`; a dash when it was not measured."""
    if value is None:
        return MISSING
    return format(value, form) if math.isfinite(value) else "not finite"


def megabytes(count: float | None) -> str:
    """Bytes as MB of 10^6: one decimal, three digits below 100."""
    if count is None:
        return MISSING
    return number_text(count / 1e6, ",.1f" if count >= 1e8 else "#.3g")


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _different(parity: dict[str, Any]) -> list[dict[str, Any]]:
    def differs(tensor: dict[str, Any]) -> bool:
        same = tensor.get("scales_equal", True) and tensor.get("zero_points_equal", True)
        return bool(tensor.get("mismatched_codes")) or not same

    return [tensor for tensor in parity.get("tensors") or [] if differs(tensor)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table ending in a newline: the first column on the left, the others on the right."""
    ruler = [":---"] + ["---:"] * (len(header) - 1)
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], ruler, *lines[1:]))
