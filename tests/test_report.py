"""The report of a run, from synthetic run folders: what is said, in what order, and that nothing breaks out."""

import importlib.util
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from qat.report.figures import FIGURES, write_figures
from qat.report.page import write_report
from qat.report.record import block_and_kind, read_run
from qat.report.table import markdown_table, overhead_table, render_table, result_rows, summary_table, warnings

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = (
    "Verdict", "Results", "Perplexity", "Loss", "Validation", "Layer health", "Sensitivity", "Coverage", "Parity",
    "Answers of the packed model", "Configuration", "Manifest",
)  # fmt: skip
FINISHED = {"status": "finished", "step": 100}
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def results(**changes) -> dict:
    base = {
        "perplexity": {
            "float": 25.92, "control": 21.24, "rtn": 60.1, "rtn_of_control": 53.24, "fake_quant": 27.9,
            "packed": 27.92,
        },
        "kl_to_float": {"float": 0.0, "control": 0.05, "rtn": 0.8, "fake_quant": 0.2, "packed": 0.2},
        "recovery": 0.702,
        "tokens": {"train": 102400, "eval": 16384},
        "bits_per_weight": 4.87,
        "bytes": {"float": 269_000_000, "packed": 81_900_000},
        "seconds": {"step_median": 2.1, "total": 300.0},
        "rows": [],
        "control_is_float": False,
        "protocol": "windows of 512 tokens, bf16",
        "seed": 0,
        "answers": [{"prompt": "What is <b>water</b>?", "answer": "<script>alert(1)</script> & wet"}],
        "notes": ["A note."],
    }  # fmt: skip
    return base | changes


def parity(verdict: str = "equal", mismatched: int = 0) -> dict:
    tensor = {"name": "model.layers.0.mlp.up_proj", "shape": [64, 32], "bits": 4, "codes": 2048}
    return {
        "verdict": verdict,
        "tensors": [tensor | {"mismatched_codes": mismatched, "scales_equal": True, "zero_points_equal": True}],
        "logits": {"max_abs_difference": 0.0, "mean_kl": 0.0, "top1_agreement": 1.0},
        "perplexity": {"fake_quant": 27.9, "packed": 27.92, "relative_difference": 7e-4},
    }


def coverage(blocks: int) -> dict:
    layers: list[dict] = [
        {"name": f"model.layers.{b}.{kind}", "kind": "linear", "shape": [64, 32], "scheme": "w4a16_g32", "bits": 4.5,
         "bytes": 1152, "weights": 2048, "reason": "scheme"}
        for b in range(blocks) for kind in KINDS
    ]  # fmt: skip
    table = {"name": "model.embed_tokens", "kind": "embedding", "shape": [512, 32], "weights": 16384, "bytes": 16896}
    layers.append(table | {"scheme": "w8a16", "bits": 8.25, "reason": "plan.embedding"})
    gate = {"name": "model.gate", "kind": "linear", "shape": [8, 32], "scheme": None, "bits": 16.0, "bytes": 512}
    layers.append(gate | {"weights": 256, "reason": "rule 'model.gate'"})
    weights = sum(layer["weights"] for layer in layers)
    return {
        "weights": weights, "quantized_weights": weights - 256, "coverage": 1 - 256 / weights, "bits_per_weight": 4.87,
        "bytes": sum(layer["bytes"] for layer in layers), "float_bytes": 2 * weights, "layers": layers,
    }  # fmt: skip


def sensitivity(blocks: int) -> dict:
    layers = [
        {"names": names, "kl": {"w2a16_g32": 0.1 * (b + 1), "w8a16": 1e-5 / (b + 1)}, "chosen": "w2a16_g32"}
        for b in range(blocks)
        for names in ([f"model.layers.{b}.{kind}" for kind in KINDS[:2]], [f"model.layers.{b}.{KINDS[4]}"])
    ]
    return {"candidates": ["w2a16_g32", "w8a16"], "layers": layers}


def metrics(steps: int, blocks: int) -> list[dict]:
    lines: list[dict] = [{"event": "phase", "step": 0, "phase": "observe"}]
    for step in range(1, steps + 1):
        if step == 10:
            lines.append({"event": "phase", "step": step, "phase": "fake_quantize"})
        loss = 2.0 * math.exp(-step / 30) + 0.2 + 0.05 * math.sin(7 * step)
        lines.append(
            {"event": "train", "step": step, "phase": "fake_quantize", "loss": loss, "kl": loss, "ce": None,
             "lr": 1e-4 * (1 - step / steps), "grad_norm": 1.0, "tokens_per_second": 500.0, "memory_gib": 1.0}
        )  # fmt: skip
        if step % 20 == 0:
            lines.append({"event": "validation", "step": step, "perplexity": 28 + 400 / step})
            layers = {
                f"model.layers.{b}.{kind}": {"sqnr_db": 18 + b % 5 + i, "clip_share": 0.001 * (i + 1),
                                             "flip_rate": 0.05 / step if i else None, "scale_drift": 1e-4 * step * i}
                for b in range(blocks) for i, kind in enumerate(KINDS)
            }  # fmt: skip
            lines.append({"event": "layers", "step": step, "layers": layers})
    return lines


def make_run(folder: Path, files: dict[str, dict | None] | None = None, steps: int = 0, blocks: int = 0) -> Path:
    """A finished run; `files` replaces contents, or leaves a file out when None. No blocks: no coverage.json."""
    contents = {
        "results": results(), "parity": parity(), "coverage": coverage(blocks) if blocks else None,
        "sensitivity": sensitivity(blocks) if blocks else None, "run_status": FINISHED,
        "manifest": {"command": "qat train", "versions": {"torch": "2.13"}, "git": None, "threads": 2},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    for name, value in (contents | (files or {})).items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "resolved.yaml").write_text("name: tiny  # <script>alert(2)</script>\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(steps, blocks)))
    return folder


def section(page: str, title: str) -> str:
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_report_has_every_section_in_order(tmp_path):
    page = write_report(make_run(tmp_path / "run", steps=100, blocks=2)).read_text()
    places = [page.index(f"<h2>{title}</h2>") for title in SECTIONS]
    assert places == sorted(places)
    assert "not run" not in page and "Warning" not in page
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert "http" not in page, "the page must work offline"
    assert "70.2 %" in section(page, "Verdict") and "all 2,048 codes of 1 tensors" in section(page, "Verdict")
    assert "model.gate" in section(page, "Coverage").split("<h3>By kind</h3>")[0]
    assert "versions.torch" in section(page, "Manifest")
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_report_never_imports_torch_and_draws_only_when_called(tmp_path):
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from qat.report.page import write_report\n"
        "assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)\n"
        f"write_report(Path({str(run)!r})); assert not {{'matplotlib.pyplot', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_report_escapes_html_when_answers_or_config_hold_markup(tmp_path):
    page = write_report(make_run(tmp_path / "run")).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; wet" in section(page, "Answers of the packed model")
    assert "What is &lt;b&gt;water" in page
    assert "&lt;script&gt;alert(2)" in section(page, "Configuration")


def test_report_says_not_run_when_files_are_missing(tmp_path):
    page = write_report(tmp_path).read_text()
    for title in SECTIONS:
        assert "not run" in section(page, title), title
    assert "not known whether the run finished" in page.split("<h1>")[0]


@pytest.mark.parametrize("name", ["results", "parity", "coverage", "run_status", "manifest"])
def test_report_is_written_when_a_file_is_empty_or_torn(tmp_path, name):
    run = make_run(tmp_path / "run", {name: {}})
    write_report(run)
    (run / f"{name}.json").write_text('{"half": ')
    assert f"left out: {name}.json." in write_report(run).read_text().split("<h1>")[0]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"results": results(perplexity=results()["perplexity"] | {"packed": 99.5})}, "99.50, against 53.24"),
        ({"results": results(perplexity=results()["perplexity"] | {"packed": math.nan})}, "not finite"),
        ({"parity": parity("different", 3)}, "1 of 1 tensors (codes, scales or zero points), 3 codes"),
        ({"parity": parity("equal", 3)}, "not the trained one"),
        ({"run_status": {"status": "failed", "step": 37}}, "status is &#x27;failed&#x27; at step 37"),
    ],
)
def test_report_warns_before_anything_else(tmp_path, files, text):
    page = write_report(make_run(tmp_path / "run", files)).read_text()
    body = page.split("<body>")[1]
    assert body.lstrip().startswith('<div class="warning" role="alert">Warning: ')
    assert text in body.split("<h1>")[0]


def test_warnings_use_rtn_of_float_when_the_control_is_the_float_model():
    values = {"float": 20.0, "rtn": 30.0, "control": None, "rtn_of_control": None, "packed": 31.0}
    found = warnings(results(perplexity=values, control_is_float=True), parity(), FINISHED)
    assert len(found) == 1 and "31.00, against 30.00" in found[0]
    assert not warnings(results(perplexity=values | {"packed": 29.0}, control_is_float=True), parity(), FINISHED)


def test_table_has_six_rows_and_says_what_the_control_is():
    assert [row.key for row in result_rows(results())] == list(results()["perplexity"])
    trained = markdown_table(results())
    assert trained.count("\n") == 8 and "Float control (same training, not quantized) | 21.24" in trained
    itself = markdown_table(results(control_is_float=True))
    assert itself.count("\n") == 8 and "Control: the float model itself" in itself
    assert [row.perplexity for row in result_rows({})] == [None] * 6


def test_table_takes_bits_and_bytes_of_a_row_and_keeps_further_rows():
    rows = [
        {"name": "float", "bits_per_weight": 16.0, "bytes": 7},
        {"name": "gptq", "perplexity": 30.0, "bits_per_weight": 4.5, "bytes": 5},
    ]
    table = {row.key: row for row in result_rows(results(rows=rows))}
    assert (table["float"].bits_per_weight, table["float"].bytes) == (16.0, 7)
    assert table["packed"].bytes == 81_900_000
    assert (table["gptq"].label, table["gptq"].perplexity) == ("gptq", 30.0)


def test_terminal_table_prints_warning_and_text_that_looks_like_markup():
    console = Console(width=120, record=True, file=io.StringIO())
    rows = [{"name": "[red]odd", "perplexity": 1.0}]
    console.print(render_table(results(rows=rows), parity("different", 3)))
    text = console.export_text()
    assert "WARNING: The packed model is not the trained one" in text
    assert "[red]odd" in text and "27.92" in text and "81.9" in text


def test_figures_are_png_and_only_those_with_data(tmp_path):
    run = make_run(tmp_path / "run", {"results": None, "sensitivity": None}, steps=15, blocks=6)
    paths = write_figures(run)
    assert list(paths) == ["loss", "bytes"]
    for path in paths.values():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_heat_map_has_a_cell_for_every_layer_and_a_dot_for_its_choice(tmp_path):
    figure = FIGURES["sensitivity"](read_run(make_run(tmp_path / "run", blocks=3)))
    panels = [axes for axes in figure.axes if axes.images and axes.get_ylabel() in ("w2a16_g32", "w8a16")]
    assert [panel.images[0].get_array().shape for panel in panels] == [(3, 3), (3, 3)]
    assert panels[0].images[0].get_array()[:, 2].tolist() == pytest.approx([0.3] * 3)
    assert [len(panel.collections) for panel in panels] == [1, 0]
    assert len(panels[0].collections[0].get_offsets()) == 9
    strange = {"candidates": ["w8a16"], "layers": [{"names": ["model.layers.0.x"], "kl": {"w8a16": None}}, {}]}
    assert FIGURES["sensitivity"](read_run(make_run(tmp_path / "other", {"sensitivity": strange}))) is None


def test_metrics_drop_repeated_steps_and_name_torn_lines_when_a_run_was_resumed(tmp_path):
    train = [{"event": "train", "step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 9.0), (3, 9.0), (2, 2.0))]
    text = "".join(json.dumps(line) + "\n" for line in train) + '{"event": "train", "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    record = read_run(tmp_path)
    assert record.series("train", "loss") == ([1, 2], [3.0, 2.0])
    assert record.unreadable == ["metrics.jsonl line 5"]


def test_block_and_kind_read_layer_names():
    assert block_and_kind("model.layers.3.mlp.down_proj") == (3, "mlp.down_proj")
    assert block_and_kind("model.layers.3.mlp.experts.11.down_proj") == (3, "mlp.experts.*.down_proj")
    assert block_and_kind("lm_head") == (None, "lm_head")


def make_tables(root: Path, *arguments: str) -> int:
    path = ROOT / "scripts" / "make_tables.py"
    spec = importlib.util.spec_from_file_location("make_tables", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(["--root", str(root), *arguments])


def make_documents(root: Path) -> None:
    (root / "docs" / "results").mkdir(parents=True)
    (root / "recipes").mkdir()
    run = results(recipe="tiny_w4a16", command="qat train recipe=tiny_w4a16")
    (root / "docs" / "results" / "tiny.json").write_text(json.dumps(run))
    row = {"name": "plain", "threads": 2, "median_seconds": 1.5, "ratio_to_plain": 1.0, "spread": [0.98, 1.03]}
    row |= {"peak_memory_gib": 2.0, "memory_ratio": 1.0}
    bench = {"machine": "2 cores", "torch": "2.13", "tokens": 512, "rows": [row]}
    (root / "docs" / "results" / "bench_step.json").write_text(json.dumps(bench))
    bench_place = "<!-- bench_step:begin -->\n<!-- bench_step:end -->\n"
    for name in ("README.md", "recipes/README.md"):
        (root / name).write_text(f"Before \\1\n<!-- results:begin -->\nold\n<!-- results:end -->\n{bench_place}After\n")


def test_make_tables_check_detects_a_stale_table_and_a_run_mends_it(tmp_path):
    make_documents(tmp_path)
    assert make_tables(tmp_path, "--check") == 1
    assert "old" in (tmp_path / "README.md").read_text()
    assert make_tables(tmp_path) == 0
    assert make_tables(tmp_path, "--check") == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before \\1\n") and text.endswith("After\n") and "old" not in text
    assert "`tiny_w4a16`" in text and "0.98 – 1.03" in text
    recipes = (tmp_path / "recipes" / "README.md").read_text()
    assert "qat train recipe=tiny_w4a16" in recipes and markdown_table(results()) in recipes
    (tmp_path / "README.md").write_text(text.replace("27.92", "12.00"))
    assert make_tables(tmp_path, "--check") == 1


@pytest.mark.parametrize("broken", ["<!-- results:end -->\n<!-- results:begin -->", "<!-- results:begin -->"])
def test_make_tables_refuses_when_a_marker_is_missing_or_misplaced(tmp_path, broken):
    make_documents(tmp_path)
    (tmp_path / "README.md").write_text(broken)
    with pytest.raises(SystemExit, match="results:begin"):
        make_tables(tmp_path)


def test_make_tables_refuses_when_a_table_has_no_place(tmp_path):
    make_documents(tmp_path)
    for name in ("README.md", "recipes/README.md"):
        (tmp_path / name).write_text("<!-- results:begin --><!-- results:end -->")
    with pytest.raises(SystemExit, match="bench_step"):
        make_tables(tmp_path)


def test_summary_says_when_the_control_is_the_float_model():
    line = summary_table([results(recipe="a|b", control_is_float=True)]).splitlines()[2]
    assert line == "| `a\\|b` | 0 | 4.87 | 25.92 | = float | 53.24 | 27.92 | 70 % | 269.0 → 81.9 |"


def test_overhead_is_shown_as_a_share_of_the_step():
    rows = [{"name": way, "median_seconds": 2.0, "ratio": 1.001, "spread": [0.99, 1.01]} for way in ("bare", "polled")]
    bench = {"rows": rows, "poll_seconds": 2e-5, "poll_share": 1e-5, "save_seconds": 1.5, "save_share": 0.0075}
    bench |= {"save_bytes": 1_620_000_000, "every": 100, "share": 0.00751, "status_seconds": 0.002, "quiet": False}
    bench |= {"scheme": "w4a16_g32", "tokens": 1024, "threads": 2, "machine": {"cpu": "c", "torch": "t"}}
    text = overhead_table(bench)
    assert "| a checkpoint of 1,620.0 MB, every 100 steps | 1.5e+03 | 0.750% |" in text
    assert "| together | – | 0.751% |" in text
    assert "1.001 × as long (0.990 – 1.010" in text and "Others used the machine" in text
